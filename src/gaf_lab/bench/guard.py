"""What gaf.Guard sees and saves: faults put into one of k workers, in one process.

Runs of the same seed see the same micro-batches, and are the same until the fault begins. A policy
gets the Gram matrix of the k micro-gradients; under `gaf.attach` it decides from the same numbers.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import gaf
from gaf_lab.bench.fleet import Fleet
from gaf_lab.bench.guard_faults import CLEAN, FAULTS, LABELS, ROW_FAULTS, STALE
from gaf_lab.bench.guard_results import FalseAlarms, FaultFound
from gaf_lab.bench.guard_runs import GUARDED_WAYS, GuardedRun
from gaf_lab.bench.guard_tasks import GuardTask
from gaf_lab.progress import Tell, silent

CLEAN_RUNS = 4  # seeds without a fault, which share the clean steps


class GuardLengths(NamedTuple):
    """Steps before a fault, steps with it, and steps without any, in all clean runs together."""

    before: int = 200
    after: int = 200
    clean: int = 10_000


class GuardedFleet:
    """Runs of one task with k workers, all at once.

    Args:
        runs: those of the same seed see the same micro-batches.
    """

    def __init__(self, task: GuardTask, k: int, runs: list[GuardedRun]) -> None:
        self.task, self.k, self.runs = task, k, runs
        self.networks = Fleet([network_of(task, run.seed) for run in runs], task.rate)
        self.stale = self.networks.weights
        self.batches = draw_batches(task, k, {run.seed for run in runs})
        self.rng = Generator().manual_seed(0)

    def break_down(self, faults: Sequence[str]) -> None:
        """Each run goes on once with each fault."""
        self.networks.choose(torch.arange(len(self.runs)).repeat_interleave(len(faults)))
        self.runs = [run.fork(fault) for run in self.runs for fault in faults]
        self.stale = self.networks.weights

    def take_step(self, step: int) -> None:
        drawn = next(self.batches)
        chosen = torch.stack([drawn[run.seed] for run in self.runs])
        x, y = (part[chosen] for part in self.task.train)
        weights = self.networks.weights[:, None].repeat(1, self.k, 1)
        for i, bad in self._broken(LABELS):
            y[i, bad] = torch.randint(self.task.classes, y[i, bad].shape, generator=self.rng)
        for i, bad in self._broken(STALE):
            weights[i, bad] = self.stale[i]
        rows = self.networks.rows(weights, x, y)
        for fault, change in ROW_FAULTS.items():
            for i, bad in self._broken(fault):
                change(rows[i, bad], self.rng)
        self._move(rows, step)

    def _broken(self, fault: str) -> Iterator[tuple[int, int]]:
        """The runs with this fault, and which of their workers has it."""
        for i, run in enumerate(self.runs):
            if run.fault == fault:
                yield i, run.bad(self.k)

    def _move(self, rows: Tensor, step: int) -> None:
        exact = rows.double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of alarms, which are counted
            each = zip(self.runs, rows, exact @ exact.mT, strict=True)
            decided = [run.decide(own, gram, step) for run, own, gram in each]
        updates, stepped = zip(*decided, strict=True)
        self.networks.step(torch.stack(updates), torch.tensor(stepped))


def draw_batches(task: GuardTask, k: int, seeds: set[int]) -> Iterator[dict[int, Tensor]]:
    """For each step and seed the numbers of examples, (k, b)."""
    generators = {seed: Generator().manual_seed(seed) for seed in seeds}
    count, size = len(task.train[1]), (k, task.b)
    while True:
        yield {s: torch.randint(count, size, generator=rng) for s, rng in generators.items()}


def network_of(task: GuardTask, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return task.network()


def measure_faults(
    task: GuardTask, k: int, seeds: int, lengths: GuardLengths, tell: Tell = silent
) -> list[FaultFound]:
    """Every fault under every way of stepping."""
    ways = GUARDED_WAYS.items()
    runs = [GuardedRun(way, seed, CLEAN, make()) for way, make in ways for seed in range(seeds)]
    fleet, total = GuardedFleet(task, k, runs), lengths.before + lengths.after
    for step in range(1, total + 1):
        if step == lengths.before + 1:
            fleet.break_down(FAULTS)
        fleet.take_step(step)
        tell(f"{task.name}, k = {k}", step, total)
    tested = list(zip(fleet.runs, *fleet.networks.test(*task.test), strict=True))
    return [
        summarise(task.name, k, fault, [one for one in tested if one[0].fault == fault], lengths)
        for fault in FAULTS
    ]


Tested = tuple[GuardedRun, float, float]  # with its loss and its accuracy


def summarise(
    task: str, k: int, fault: str, tested: list[Tested], lengths: GuardLengths
) -> FaultFound:
    guarded = [run for run, _, _ in tested if run.way == "Guard"]
    alarms = [run.right_alarms(k, lengths.before) for run in guarded]
    loss: dict[str, list[float | None]] = {way: [] for way in GUARDED_WAYS}
    accuracy: dict[str, list[float]] = {way: [] for way in GUARDED_WAYS}
    for run, last, share in tested:
        loss[run.way].append(last if math.isfinite(last) else None)
        accuracy[run.way].append(share)
    return FaultFound(
        task,
        k,
        fault,
        delays=[own[0]["step"] - lengths.before if own else None for own in alarms],
        kinds=[own[0]["kind"] if own else None for own in alarms],
        wrong=sum(len(run.wrong_alarms(k, lengths.before)) for run in guarded),
        loss=loss,
        accuracy=accuracy,
    )


def measure_false_alarms(
    task: GuardTask, k: int, lengths: GuardLengths, tell: Tell = silent
) -> FalseAlarms:
    """Runs of Guard, as it is by default, in which nothing is wrong."""
    runs = [GuardedRun("Guard", seed, CLEAN, gaf.Guard()) for seed in range(CLEAN_RUNS)]
    fleet, steps = GuardedFleet(task, k, runs), lengths.clean // CLEAN_RUNS
    for step in range(1, steps + 1):
        fleet.take_step(step)
        tell(f"{task.name}, k = {k}, nothing wrong", step, steps)
    alarms = [{"seed": run.seed, **alarm} for run in runs for alarm in run.book.alarms]
    return FalseAlarms(task.name, k, steps * CLEAN_RUNS, alarms)
