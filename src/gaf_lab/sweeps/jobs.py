"""The plan of a sweep as jobs, and the words that the sweep and its engines exchange about them."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.score import Score
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import folder_name
from gaf_lab.settings.sizes import PICTURES
from gaf_lab.training.console import share_or_dash
from gaf_lab.training.resume import finished_run

TASK_SAMPLES = 10_000  # what a task of the user's own is taken to have


@dataclass(frozen=True)
class JobProgress:
    """How far a run has come, in [0, 1], and the accuracies of its last evaluation."""

    share: float
    facts: str


@dataclass(frozen=True)
class JobEnd:
    """How a run's process ended. busy: another process holds the run. died: the process is gone."""

    how: Literal["finished", "failed", "busy", "died"]
    why: str = ""


@dataclass(frozen=True)
class Job:
    """A run of the plan. after: the job whose run this one replays, if the plan holds it."""

    name: str
    config: TrainConfig
    folder: Path
    after: str | None
    data_folder: Path | None
    keep_checkpoints: bool
    command: str | None

    def finished_run(self) -> records.Run | None:
        """The run's records, if they are complete."""
        with contextlib.suppress(ValueError):
            return finished_run(self.config, self.folder)
        return None

    @property
    def resumable(self) -> bool:
        return (self.folder / checkpoint.CHECKPOINT_FILE).is_file()

    @property
    def title(self) -> str:
        """The folder's name without the hash, which a person does not read."""
        return self.name.removesuffix(f"-{self.config.hash}")

    @property
    def samples(self) -> float:
        """About how many samples the whole run draws: steps x k x b."""
        if self.config.task:  # how many it has is not known: runs of one task compare
            drawn_from = TASK_SAMPLES
        else:
            pictures = PICTURES[self.config.dataset]
            drawn_from = min(self.config.limit or pictures, pictures)
        return self.config.passes * drawn_from * (1 - self.config.heldout)

    def recorded_progress(self) -> JobProgress:
        """The progress in the records; none without a checkpoint to resume from."""
        with contextlib.suppress(ValueError):
            run = records.read(self.folder)
            evals = run.evals
            if evals and self.resumable:
                share = min(1.0, evals[-1]["passes"] / self.config.passes)
                return JobProgress(share, accuracies(evals[-1], run.score))
        return JobProgress(0.0, "")

    def state(self) -> str:
        """finished, diverged, 40% and the accuracies, or not begun; and the run that it replays."""
        text = "finished"
        if not self.finished_run():
            progress = self.recorded_progress()
            text = f"{progress.share:.0%}, {progress.facts}" if progress.facts else "not begun"
            text = "diverged" if self.has_diverged() else text
        return f"{text}; replays {self.after}" if self.after else text

    def has_diverged(self) -> bool:
        with contextlib.suppress(ValueError):
            return (records.read(self.folder).end or {}).get("status") == "diverged"
        return False


class Engine(Protocol):
    """Runs jobs: in processes, in turns, or on a cluster."""

    def room(self) -> int:
        """How many more jobs can be started now."""

    def start(self, job: Job) -> None: ...

    def events(self, seconds: float) -> Iterable[tuple[str, JobProgress | JobEnd]]:
        """News of the jobs, by name; waits at most `seconds` for the first."""

    def close(self) -> None:
        """Stops the jobs in progress."""


def jobs(
    configs: Sequence[TrainConfig], out: Path, names: Sequence[str] | None = None, **shared: Any
) -> dict[str, Job]:
    """The plan's runs by name, in its order.

    Of configs with equal hash, one is kept: the first that another config replays, else the first.

    Args:
        configs: the plan.
        out: folder for the runs' folders.
        names: of the folders, one for each config, in place of `gaf_lab.settings.plan.folder_name`.
        shared: `data_folder`, `keep_checkpoints` and `command`, the same for all jobs.
    """
    named = list(zip(names or map(folder_name, configs), configs, strict=True))
    replayed = {config.replay.name for config in configs if config.replay is not None}
    name_of_hash: dict[str, str] = {}
    for name, config in named:
        rival = name_of_hash.get(config.hash)
        if rival is None or (name in replayed and rival not in replayed):
            name_of_hash[config.hash] = name
    plan = {name: config for name, config in named if name_of_hash[config.hash] == name}
    return {name: make_job(name, config, out, plan, shared) for name, config in plan.items()}


def make_job(
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
    if after is None and not is_finished(out / replay):
        raise ConfigError(
            f"{name}: replay must name a run of the plan, or one that is finished in {out}; "
            f"got {replay.name!r}. Add its config to the plan, or give its path."
        )
    return Job(name, dataclasses.replace(config, replay=out / replay), out / name, after, **shared)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds the records of a finished run."""
    with contextlib.suppress(ValueError):
        run = records.read(folder)
        return run.end is not None and run.end["status"] == "finished"
    return False


def accuracies(line: dict[str, Any], score: Score) -> str:
    """The score of an evaluation, and what was memorised if that is known, as text."""
    text = f"test {score.text(score.of(line))}"
    if line["memorised"] is None and not score.share:
        return text
    return f"{text}, memorised {share_or_dash(line['memorised'])}"


def describe_plan(configs: Sequence[TrainConfig], out: Path) -> list[str]:
    """A line for each run of the plan: its folder's name, and its state."""
    plan = jobs(configs, out, data_folder=None, keep_checkpoints=True, command=None)
    finished = sum(job.finished_run() is not None for job in plan.values())
    return [
        *(f"{name:40} {job.state()}" for name, job in plan.items()),
        f"{finished} of {len(plan)} runs are finished.",
    ]
