"""Many runs, several at a time: each config once, whatever dies in between.

plan -> jobs -> engine (`sweep_local`: processes here; `sweep_ray`: a cluster) -> `work`: lock, resume or begin, train, index

A run is finished where its folder's records say so, for this config's hash; nothing else is remembered. So the same command
goes on after any interruption, and several sweeps may share a folder: a run belongs to the process that holds the lock in
its folder, which the kernel gives back when that process dies. `sweep.jsonl` has a line for each finished run:
{"name", "arm", "seed", "hash", "test_last", "test_selected", "seconds"}, accuracies in [0, 1].
"""

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console

from gaf_lab.progress import Pulse
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.locks import FolderBusy, file_lock, own_folder
from gaf_lab.settings.config import MOST_WORKERS, PICTURES, ConfigError, TrainConfig, check_count
from gaf_lab.settings.plan import folder_name
from gaf_lab.training.console import percent, progress
from gaf_lab.training.run import Listener, Turns, completed, train_in_turns
from gaf_lab.training.run import finished as all_of

EngineName = Literal["local", "together", "ray"]

INDEX = "sweep.jsonl"
# how often a run is begun or gone on with before the death of its process counts as a failure
TRIES = 3


@dataclass(frozen=True)
class Swept:
    """What came of a sweep: the finished runs in the plan's order; for each of the others, by its folder's name, the reason."""

    runs: list[records.Run]
    failed: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A run of the plan. after: the job whose run this one replays, where that is of the same plan."""

    name: str
    config: TrainConfig
    folder: Path
    after: str | None
    data_folder: Path | None
    keep_checkpoints: bool
    command: str | None

    @property
    def finished(self) -> records.Run | None:
        with contextlib.suppress(ValueError):
            return completed(self.config, self.folder)
        return None

    @property
    def resumable(self) -> bool:
        return (self.folder / checkpoint.FILE).is_file()

    @property
    def samples(self) -> float:
        """About how many samples the whole run draws: steps x k x b."""
        pictures = PICTURES[self.config.dataset]
        return (
            self.config.passes
            * min(self.config.limit or pictures, pictures)
            * (1 - self.config.heldout)
        )

    def done(self) -> "Told":
        """How far the records say that the run has come; nowhere, without a checkpoint to go on from."""
        with contextlib.suppress(ValueError):
            evals = records.read(self.folder).evals
            if evals and self.resumable:
                return Told(min(1.0, evals[-1]["passes"] / self.config.passes), facts(evals[-1]))
        return Told(0.0, "")


@dataclass(frozen=True)
class Told:
    """How far a run has come, in [0, 1], and what its last evaluation said."""

    share: float
    facts: str


@dataclass(frozen=True)
class Ended:
    """That a process has let go of a run. busy: another process is at it. died: the process itself is gone."""

    how: Literal["finished", "failed", "busy", "died"]
    why: str = ""


class Engine(Protocol):
    """Where jobs are worked on."""

    def room(self) -> int:
        """How many more jobs can be started now."""

    def start(self, job: Job) -> None: ...

    def events(self, seconds: float) -> Iterable[tuple[str, Told | Ended]]:
        """What has happened, by the job's name; waits at most so long for something."""

    def close(self) -> None:
        """Stops what is still being worked on."""


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
) -> Swept:
    """Runs each config in a folder of its own in `out`, except those that are finished there.

    Args:
        configs: a plan; those of equal hash are one run. `replay` is the folder's name of another one (`gaf_lab.settings.plan.follow`),
            which is run before, or the path of any recorded run.
        out: folder for the runs' folders and the index; on a cluster, one that all its machines share.
        workers: runs at the same time, at least 1. Each process computes with cores // workers threads, in Ray with one.
        data_folder: where the data sets' archives or files are; None downloads them.
        console: where progress is shown.
        command: recorded with each run, so that a reader can run it again.
        engine: processes on this machine; runs that take turns in this process, for one GPU; or tasks on a Ray cluster.
        keep_checkpoints: without them a run that is cut off starts anew.
        names: of the folders, one for each config, in place of `gaf_lab.settings.plan.folder_name`.
        address: of the Ray cluster, HOST:PORT; "auto" is the one that this machine is part of.

    Raises:
        ConfigError: where a run that is to be replayed is neither planned nor finished, or `out` or the engine cannot be used.
        KeyboardInterrupt: after the processes have been stopped; calling this again goes on.
    """
    if engine != "ray":
        check_count("workers", workers, 1, MOST_WORKERS, "One for each core is usual.")
    records.make_folder(out)
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
    done = {name: run for name, job in plan.items() if (run := job.finished)}
    index(out, done.values())
    if len(done) == len(plan):
        return Swept(list(done.values()), {})
    with contextlib.closing(started(engine, workers, address)) as place:
        return Sweeping(plan, done, Board(console, plan, done)).run(place)


def described(configs: Sequence[TrainConfig], out: Path) -> list[str]:
    """A line for each run of the plan: its folder's name, and how far it is."""
    plan = jobs(configs, out, data_folder=None, keep_checkpoints=True, command=None)
    lines = []
    for name, job in plan.items():
        done = job.done()
        how = (
            "finished"
            if job.finished
            else f"{done.share:.0%}, {done.facts}"
            if done.facts
            else "not begun"
        )
        lines.append(f"{name:40} {how}" + (f"; replays {job.after}" if job.after else ""))
    return [
        *lines,
        f"{sum(job.finished is not None for job in plan.values())} of {len(plan)} runs are finished.",
    ]


def started(engine: str, workers: int, address: str) -> Engine:
    if engine == "local":
        from gaf_lab.sweeps.processes import Processes

        return Processes(workers)
    if engine == "together":
        from gaf_lab.sweeps.in_turns import InTurns

        return InTurns(workers)
    try:
        from gaf_lab.sweeps.ray_tasks import Tasks
    except ModuleNotFoundError as missing:
        raise ConfigError(f"engine 'ray' needs the package {missing.name}; it is not installed. pip install 'gaf[ray]', "
                          "or use --engine local.") from None  # fmt: skip
    return Tasks(workers, address)


def jobs(
    configs: Sequence[TrainConfig], out: Path, names: Sequence[str] | None = None, **shared: Any
) -> dict[str, Job]:
    """The plan's runs by name, in its order; of configs with equal hash the one that another one replays, or the first."""
    named = list(zip(names or map(folder_name, configs), configs, strict=True))
    followed = {config.replay.name for config in configs if config.replay is not None}
    chosen: dict[str, str] = {}
    for name, config in named:
        if config.hash not in chosen or (name in followed and chosen[config.hash] not in followed):
            chosen[config.hash] = name
    kept = {name: config for name, config in named if chosen[config.hash] == name}
    return {name: job(name, config, out, kept, shared) for name, config in kept.items()}


def job(
    name: str,
    config: TrainConfig,
    out: Path,
    plan: Mapping[str, TrainConfig],
    shared: dict[str, Any],
) -> Job:
    replay = config.replay
    if replay is None or len(replay.parts) > 1:
        return Job(name, config, out / name, None, **shared)
    after = replay.name if replay.name in plan else None
    if after is None and not recorded(out / replay):
        raise ConfigError(f"{name}: replay must name a run of the plan, or one that is finished in {out}; got {replay.name!r}. "
                          "Add its config to the plan, or give its path.")  # fmt: skip
    return Job(name, dataclasses.replace(config, replay=out / replay), out / name, after, **shared)


def recorded(folder: Path) -> bool:
    with contextlib.suppress(ValueError):
        run = records.read(folder)
        return run.end is not None and run.end["status"] == "finished"
    return False


# One run, in whichever process and on whichever machine


def work(job: Job, listener: Listener) -> Ended:
    """Finishes a run, from its checkpoint where there is one; whatever goes wrong is said in what this returns."""
    return all_of(working(job, listener))


def working(job: Job, listener: Listener) -> Turns[Ended]:
    """`work`, giving way to other runs of this process while the device is at work."""
    try:
        with own_folder(job.folder, job.command):
            run = job.finished or (yield from trained(job, listener))
            index(job.folder.parent, [run])
    except FolderBusy:
        return Ended("busy")
    except Exception as error:
        return Ended("failed", f"{type(error).__name__}: {error}")
    return Ended("finished")


def trained(job: Job, listener: Listener) -> Turns[records.Run]:
    if not job.resumable:
        (job.folder / records.FILE).unlink(missing_ok=True)
    options: dict[str, Any] = {
        "data_folder": job.data_folder,
        "keep_checkpoints": job.keep_checkpoints,
        "command": job.command,
    }
    return (
        yield from train_in_turns(job.config, job.folder, listener, resume=job.resumable, **options)
    )


def index(out: Path, runs: Iterable[records.Run]) -> None:
    """Adds a line to the index for each finished run that has none; a line that was cut off is written again."""
    path = out / INDEX
    with file_lock(path), path.open("rb+") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        new = [
            json.dumps(summary(run)) + "\n"
            for run in runs
            if f'{{"name": "{run.folder.name}", '.encode() not in whole
        ]
        if len(whole) < len(content):
            file.truncate(len(whole))
        file.seek(len(whole))
        file.write("".join(new).encode())


def summary(run: records.Run) -> dict[str, Any]:
    assert run.end is not None
    what = {
        "name": run.folder.name,
        "arm": run.arm,
        "seed": run.seed,
        "hash": run.header["config_hash"],
    }
    accuracies = {
        "test_last": run.evals[-1]["test_accuracy"],
        "test_selected": run.selected["test_accuracy"],
    }
    return what | accuracies | {"seconds": run.end["seconds"]}


def facts(line: dict[str, Any]) -> str:
    return f"test {percent(line['test_accuracy'])}, memorised {percent(line['memorised'])}"


# The runs of a plan, one after the other is finished


class Sweeping:
    """Starts every run as soon as there is room and the one that it replays is finished."""

    def __init__(self, plan: dict[str, Job], done: dict[str, records.Run], board: "Board") -> None:
        self.plan, self.done, self.board = plan, dict(done), board
        self.waiting = [name for name in plan if name not in done]
        self.running: set[str] = set()
        self.failed: dict[str, str] = {}
        self.deaths: Counter[str] = Counter()
        self.not_before: dict[str, float] = {}

    def run(self, engine: Engine) -> Swept:
        with self.board:
            while self.waiting or self.running:
                for name in self.ready()[: max(0, engine.room())]:
                    engine.start(self.plan[name])
                    self.waiting.remove(name)
                    self.running.add(name)
                for name, event in engine.events(0.2):
                    if isinstance(event, Told):
                        self.board.told(name, event)
                    else:
                        self.ended(name, event)
        return Swept([self.done[name] for name in self.plan if name in self.done], self.failed)

    def ready(self) -> list[str]:
        """Runs that can be started now. Those that wait for a failed one have failed."""
        for name in list(self.waiting):
            after = self.plan[name].after
            if after in self.failed:
                self.waiting.remove(name)
                self.fail(name, f"it replays {after}, which failed.")
        now = time.monotonic()
        free = [name for name in self.waiting if self.plan[name].after in (None, *self.done)]
        return [name for name in free if now >= self.not_before.get(name, 0)]

    def ended(self, name: str, event: Ended) -> None:
        self.running.discard(name)
        run = self.plan[name].finished if event.how == "finished" else None
        self.deaths[name] += event.how == "died"
        if run is not None:
            self.done[name] = run
            self.board.finished(name, run)
        elif event.how == "busy":
            self.not_before[name] = time.monotonic() + 1
            self.board.told(name, self.plan[name].done())
            self.waiting.append(name)
        elif event.how == "died" and self.deaths[name] < TRIES:
            self.board.say(f"{name}: {event.why} It goes on from its last checkpoint.")
            self.waiting.append(name)
        elif event.how == "died":
            self.fail(name, f"{event.why} It was tried {TRIES} times.")
        else:
            self.fail(name, event.why)

    def fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.board.failed(name, why)


class Board:
    """What a person sees: a bar over all runs and one for each at work, where there is a terminal; a line for each that ends."""

    def __init__(self, console: Console, plan: dict[str, Job], done: Collection[str]) -> None:
        self.plan, self.count, self.failures = plan, len(done), 0
        self.shares = {name: plan[name].done().share for name in plan} | dict.fromkeys(done, 1.0)
        self.bars, self.pulse = progress(console), Pulse(console, self._how_far)
        # runs differ, and evaluations interrupt them: the rate over a minute says little
        self.bars.speed_estimate_period = 3600.0
        total = sum(job.samples for job in plan.values())
        self.whole = self.bars.add_task(
            "all runs", total=total, completed=int(self.samples), facts=""
        )
        self.tasks = {
            name: self.bars.add_task(title(job), total=1.0, start=False, visible=False, facts="")
            for name, job in plan.items()
        }
        self.drawn = 0.0

    def __enter__(self) -> None:
        if self.count:
            self.say(f"{self.count} of {len(self.plan)} runs are finished already.")
        self.draw()
        self.bars.start()
        self.pulse.start()

    def __exit__(self, *raised: object) -> None:
        self.pulse.stop()
        self.bars.stop()

    def _how_far(self) -> str:
        whole = self.bars.tasks[self.whole]
        share = whole.completed / whole.total if whole.total else 0.0
        return f"{self.count} of {len(self.plan)} runs finished, {share:.0%} of all samples{self._eta()}"

    def _eta(self) -> str:
        left = self.bars.tasks[self.whole].time_remaining
        if left is None or self.count + self.failures == len(self.plan):
            return ""
        return f"; eta {timedelta(seconds=round(left))}"

    @property
    def samples(self) -> float:
        return sum(self.plan[name].samples * share for name, share in self.shares.items())

    def told(self, name: str, told: Told) -> None:
        task = self.tasks[name]
        if not self.bars.tasks[task].started:
            self.bars.start_task(task)
        self.bars.update(task, completed=told.share, visible=True, facts=told.facts)
        self.shares[name] = told.share
        if time.monotonic() - self.drawn > 1:
            self.draw()

    def finished(self, name: str, run: records.Run) -> None:
        self.count += 1
        self.shares[name] = 1.0
        self.bars.update(self.tasks[name], completed=1.0, visible=False)
        self.draw()
        assert run.end is not None
        self.say(
            f"{self.count} of {len(self.plan)}: {name}: {facts(run.evals[-1])}, {run.end['seconds']:.0f} s{self._eta()}"
        )

    def failed(self, name: str, why: str) -> None:
        self.failures += 1
        self.bars.update(self.tasks[name], visible=False)
        self.say(f"{name} failed: {why}")

    def draw(self) -> None:
        self.drawn = time.monotonic()
        failures = f", {self.failures} failed" if self.failures else ""
        self.bars.update(
            self.whole,
            completed=self.samples,
            facts=f"{self.count} of {len(self.plan)} finished{failures}",
        )

    def say(self, text: str) -> None:
        self.pulse.rest()
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


def title(job: Job) -> str:
    """The folder's name as far as a person reads it: without the hash."""
    return job.name.removesuffix(f"-{job.config.hash}")
