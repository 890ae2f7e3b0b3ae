"""Training steps per second: averaging and GAF as in `gaf train`, and a plain PyTorch loop.

They take turns in one process, and ratios are of the same round. A step of ours is all that
`gaf train` does for it: drawing, augmentation, k micro-gradients, the decision, the optimizer, the
progress bar. On CUDA many are launched at once, as there. The plain loop (`plain_loop`) filters as
well.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from gaf_lab.bench.plain_loop import PlainLoop
from gaf_lab.bench.timing import StepsFunction, StepTime, time_in_turn
from gaf_lab.bench.train_parts import repeat, step_parts, time_saving
from gaf_lab.bench.train_results import (
    ALL,
    AVERAGING,
    BOOKS,
    DATA,
    PAPER,
    PASSES,
    PLAIN_LOOP,
    REST,
    SAVING,
    ArmTime,
    PartTime,
)
from gaf_lab.progress import Tell, silent
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.choices import DataName, ModelName
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import CIFAR100_GAF
from gaf_lab.settings.reading import with_task
from gaf_lab.training import models
from gaf_lab.training.console import ConsoleListener
from gaf_lab.training.device_engine import OnDevice
from gaf_lab.training.loop import Training
from gaf_lab.training.tables import AHEAD

TIMED_ARMS: dict[str, dict[str, Any]] = {
    AVERAGING: {"policy": "mean"},
    ALL: {"tau": 2.0},
    PAPER: {"tau": 0.97},
}
TRAINING_ROUNDS = 10  # with the same models: their places in memory move times by some percent
BLOCK = {"cpu": 1, "cuda": AHEAD}  # steps between two looks at the clock: a look waits for CUDA
SAVES = 5


@dataclass(frozen=True)
class TrainSetup:
    """A benchmark's conditions.

    task: of the user's own, in place of pictures; its micro-batches are drawn in shuffled passes.
    data_folder: of CIFAR-100; None: pictures of white noise of the same shape. workers: processes
    of the plain loop's DataLoader, one row for each number.
    """

    data_folder: Path | None = None
    task: str = ""
    model: ModelName = "resnet18"
    stem: models.Stem = "imagenet"
    k: int = 2
    b: int = 100
    sampler: Literal["iid", "stratified-clean"] = "stratified-clean"
    engine: Literal["auto", "plain", "device"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 30
    workers: tuple[int, ...] = (0,)

    def config(self, **changes: Any) -> TrainConfig:
        """The paper's config of CIFAR-100 (section 4.1) under these conditions."""
        names = ("model", "stem", "k", "b", "sampler", "engine", "device")
        shared = {name: getattr(self, name) for name in names}
        dataset: DataName = "noise" if self.data_folder is None else "cifar100"
        config = dataclasses.replace(CIFAR100_GAF, dataset=dataset, **shared, **changes)
        if not self.task:
            return config
        return dataclasses.replace(with_task(config, self.task), sampler="iid")

    def conditions(self) -> dict[str, Any]:
        """What is recorded of them."""
        config = self.config()
        data = ("dataset", "model", "stem", "k", "b", "sampler", "augment", "noise", "noise_rate")
        recorded = {name: getattr(config, name) for name in (*data, "engine", "device")}
        if self.task:
            recorded |= {"task": config.task, "task_source": config.task_source}
        return recorded | {"rounds": self.rounds, "workers": self.workers}


def measure_training(setup: TrainSetup, tell: Tell = silent) -> list[ArmTime | PartTime]:
    """Measures every arm, every plain loop, and the parts of GAF's step.

    A round is a block of steps of each in turn. tell: is called with the progress.
    """
    check_train_setup(setup)
    times: dict[str, list[StepTime]] = {}
    rows: dict[str, list[int]] = {name: [] for name in TIMED_ARMS}
    with unseen_console() as listener:
        for start in range(0, setup.rounds, TRAINING_ROUNDS):
            tell("all arms", start, setup.rounds)
            trainings = {
                name: Training(setup.config(**changes), setup.data_folder)
                for name, changes in TIMED_ARMS.items()
            }
            gaf = trainings[ALL]
            listener.begin(gaf.problem, 0, gaf.problem.steps)
            rounds = min(TRAINING_ROUNDS, setup.rounds - start)
            work = timed_work(setup, trainings, listener)
            found = time_in_turn(work, rounds, BLOCK[gaf.device.type], gaf.device)
            for name, took in found.items():
                times[name] = times.get(name, []) + took
            for name, training in trainings.items():
                rows[name] += training.interval.rows
        saving = time_saving(gaf, min(SAVES, setup.rounds))
    return [*arm_times(setup, times, rows), *part_times(times, saving)]


def check_train_setup(setup: TrainSetup) -> None:
    if setup.rounds < 2:
        raise ConfigError(
            f"rounds must be at least 2, for a spread; got {setup.rounds}. Give --rounds 30."
        )
    if not setup.workers or min(setup.workers) < 0:
        raise ConfigError(
            f"workers must be one number or more, each at least 0; got {setup.workers}. "
            "Give --workers 0."
        )


@contextlib.contextmanager
def unseen_console() -> Iterator[ConsoleListener]:
    """The console of `gaf train`, which does all its work and shows nothing."""
    with Path(os.devnull).open("w") as nowhere:
        listener = ConsoleListener(Console(file=nowhere, force_terminal=True))
        try:
            yield listener
        finally:
            listener.close()


def timed_work(
    setup: TrainSetup, trainings: Mapping[str, Training], listener: ConsoleListener
) -> dict[str, StepsFunction]:
    """What is timed: steps of each arm and plain loop, and the parts of a step by themselves."""
    gaf = trainings[ALL]
    work: dict[str, StepsFunction] = {
        name: partial(take_training_steps, training, listener)
        for name, training in trainings.items()
    }
    for workers in setup.workers:
        loop = PlainLoop(gaf.config, gaf.problem, gaf.device, workers)
        work[loop_name(workers)] = repeat(loop.step)
    return work | step_parts(gaf, listener)


def take_training_steps(training: Training, listener: ConsoleListener, steps: int) -> None:
    """What `Training.run` does between evaluations."""
    if isinstance(training.accumulator, OnDevice):
        rate = training.optimizer.param_groups[0]["lr"]  # constant until an evaluation
        training.accumulator.launch(range(training.step, training.step + steps), [rate] * steps)
        training.accumulator.fetch()
    for _ in range(steps):
        outcome = training.macro_batch()
        listener.stepped(training.step, outcome)


def loop_name(workers: int) -> str:
    return PLAIN_LOOP if workers == 0 else f"{PLAIN_LOOP}, {workers} workers"


def arm_times(
    setup: TrainSetup, times: Mapping[str, list[StepTime]], rows: Mapping[str, list[int]]
) -> list[ArmTime]:
    """rows: accepted micro-gradients of each step, by arm; the plain loops take every step."""
    averaging, plain = times[AVERAGING], times[loop_name(setup.workers[0])]
    stepped = {name: sum(map(bool, rows[name])) / len(rows[name]) for name in TIMED_ARMS}
    stepped |= {loop_name(workers): 1.0 for workers in setup.workers}
    return [ArmTime(name, times[name], averaging, plain, share) for name, share in stepped.items()]


def part_times(times: Mapping[str, list[StepTime]], saving: list[StepTime]) -> list[PartTime]:
    whole = times[ALL]
    each = zip(whole, times[DATA], times[BOOKS], times[PASSES], strict=True)
    parts = {
        DATA: times[DATA],
        BOOKS: times[BOOKS],
        SAVING: saving,
        PASSES: times[PASSES],
        REST: [step - data - books - passes for step, data, books, passes in each],
    }
    return [PartTime(name, took, whole[: len(took)]) for name, took in parts.items()]
