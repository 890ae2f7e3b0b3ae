"""Many runs, several at a time; each config is run once, whatever dies in between.

plan -> `jobs` -> engine (`processes` here, `in_turns` on one GPU, `ray_tasks`) -> `worker`

A run is finished if its folder's records say so for this config's hash. Nothing else is remembered,
so the same command resumes after any interruption, and several sweeps may share a folder. A run
belongs to the process that holds the lock in its folder; the kernel releases it when that process
dies. `sweep.jsonl` has a line for each finished run: {"name", "arm", "seed", "hash", "test_last",
"test_selected", "seconds"}, with accuracies in [0, 1].
"""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from gaf_lab.records import run as records
from gaf_lab.records.output import make_folder
from gaf_lab.settings.checks import MOST_WORKERS, ConfigError, check_count
from gaf_lab.settings.config import TrainConfig
from gaf_lab.sweeps.board import Board
from gaf_lab.sweeps.jobs import Engine, Job, JobEnd, JobProgress, jobs
from gaf_lab.sweeps.worker import add_to_index

EngineName = Literal["local", "together", "ray"]

MOST_TRIES = 3  # processes that may die at a run; then it has failed


@dataclass(frozen=True)
class SweepResult:
    """The finished runs in the plan's order; for each other run, by folder name, the reason."""

    runs: list[records.Run]
    failed: dict[str, str]


def sweep(
    configs: Sequence[TrainConfig],
    out: Path,
    *,
    workers: int,
    data_folder: Path | None,
    console: Console,
    command: str | None = None,
    engine: EngineName = "local",
    keep_checkpoints: bool = True,
    names: Sequence[str] | None = None,
    address: str = "auto",
    seconds: Mapping[str, float] | None = None,
) -> SweepResult:
    """Runs each config in its own folder in `out`, except those that are finished there.

    Args:
        configs: a plan; those of equal hash are one run. `replay` is the folder name of another run
            (`gaf_lab.settings.plan.follow`), which is run first, or the path of a recorded run.
        out: folder for the runs' folders and the index; for Ray, one that all machines share.
        workers: runs at the same time, at least 1. Each process computes with cores // workers
            threads, in Ray with one.
        data_folder: folder with the data sets' archives or files; None downloads them.
        console: where progress is shown.
        command: recorded with each run, so that a reader can run it again.
        engine: "local": processes on this machine; "together": runs that take turns in this
            process, for one GPU; "ray": tasks on a Ray cluster.
        keep_checkpoints: if False, an interrupted run starts anew.
        names: of the folders, one for each config, in place of `gaf_lab.settings.plan.folder_name`.
        address: of the Ray cluster, HOST:PORT; "auto" is the one that this machine is part of.
        seconds: what each run should take, by config hash, for the time left; it is corrected as
            runs go on.

    Raises:
        ConfigError: if a run to be replayed is neither planned nor finished, or if `out` or the
            engine cannot be used.
        KeyboardInterrupt: after the processes have been stopped; calling this again resumes.
    """
    if engine != "ray":
        check_count("workers", workers, 1, MOST_WORKERS, "One for each core is usual.")
    make_folder(out)
    if engine == "ray":
        out, data_folder = out.resolve(), data_folder and data_folder.resolve()
    plan = jobs(
        configs,
        out,
        names,
        data_folder=data_folder,
        keep_checkpoints=keep_checkpoints,
        command=command,
    )
    done = {name: run for name, job in plan.items() if (run := job.finished_run())}
    add_to_index(out, done.values())
    if len(done) == len(plan):
        return SweepResult(list(done.values()), {})
    with contextlib.closing(make_engine(engine, workers, address)) as running:
        return Dispatcher(plan, done, Board(console, plan, done, seconds)).run(running)


def make_engine(name: EngineName, workers: int, address: str) -> Engine:
    if name == "local":
        from gaf_lab.sweeps.processes import Processes

        return Processes(workers)
    if name == "together":
        from gaf_lab.sweeps.in_turns import InTurns

        return InTurns(workers)
    try:
        from gaf_lab.sweeps.ray_tasks import Tasks
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"engine 'ray' needs the package {missing.name}; it is not installed. "
            "pip install 'gaf[ray]', or use --engine local."
        ) from None
    return Tasks(workers, address)


class Dispatcher:
    """Starts each run as soon as the engine has room and the run that it replays is finished."""

    def __init__(self, plan: dict[str, Job], done: dict[str, records.Run], board: Board) -> None:
        self.plan, self.done, self.board = plan, dict(done), board
        self.waiting = [name for name in plan if name not in done]
        self.running: set[str] = set()
        self.failed: dict[str, str] = {}
        self.deaths: Counter[str] = Counter()
        self.not_before: dict[str, float] = {}

    def run(self, engine: Engine) -> SweepResult:
        with self.board:
            while self.waiting or self.running:
                for name in self.startable()[: max(0, engine.room())]:
                    engine.start(self.plan[name])
                    self.board.show_started(name)
                    self.waiting.remove(name)
                    self.running.add(name)
                for name, event in engine.events(0.2):
                    if isinstance(event, JobProgress):
                        self.board.show_progress(name, event)
                    else:
                        self.end(name, event)
        runs = [self.done[name] for name in self.plan if name in self.done]
        return SweepResult(runs, self.failed)

    def startable(self) -> list[str]:
        """Runs that can be started now. A run that replays a failed one has failed too."""
        for name in list(self.waiting):
            after = self.plan[name].after
            if after in self.failed:
                self.waiting.remove(name)
                self.fail(name, f"it replays {after}, which failed.")
        now = time.monotonic()
        free = [name for name in self.waiting if self.plan[name].after in (None, *self.done)]
        return [name for name in free if now >= self.not_before.get(name, 0)]

    def end(self, name: str, event: JobEnd) -> None:
        """Files a run under done or failed, or puts it back in the queue."""
        self.running.discard(name)
        if event.how == "busy":
            self.not_before[name] = time.monotonic() + 1
            self.board.show_progress(name, self.plan[name].recorded_progress())
            self.waiting.append(name)
        elif event.how == "died":
            self.retry(name, event.why)
        elif event.how == "finished" and (run := self.plan[name].finished_run()):
            self.done[name] = run
            self.board.show_finished(name, run)
        else:
            self.fail(name, event.why)

    def retry(self, name: str, why: str) -> None:
        self.deaths[name] += 1
        if self.deaths[name] == MOST_TRIES:
            self.fail(name, f"{why} It was tried {MOST_TRIES} times.")
        else:
            self.board.say(f"{name}: {why} It resumes from its last checkpoint.")
            self.waiting.append(name)

    def fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.board.show_failed(name, why)
