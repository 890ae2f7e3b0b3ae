"""gaf probe: trains a config, and probes its micro-gradients for the tau that suits them."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf.measure.probe import probe_losses
from gaf.measure.result import Probe
from gaf_lab.experiments.probe_point import ProbePoint
from gaf_lab.progress import Tell, silent
from gaf_lab.records import environment
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.rules import MOST_STEPS
from gaf_lab.training.loop import Training

MULTIPLES = (1, 2, 4, 8)
JACKKNIFE_PARTS = 8  # of each half of the rows
STUDENT = 2.365  # 97.5% of Student's t with 7 degrees of freedom
MOST_SLICES = 1000


def probe_training(
    config: TrainConfig,
    after: Sequence[int],
    data_folder: Path | None,
    rows: int,
    slices: int,
    share: float,
    chance: float,
    tell: Tell = silent,
) -> Iterator[ProbePoint]:
    """Trains the config, and probes it after each of these numbers of steps.

    Each probe is reported at b and at multiples of it.

    Args:
        config: of the training.
        after: numbers of steps.
        data_folder: with the data set's archive; None downloads it.
        rows: micro-gradients of a probe.
        slices: parts that the gradient is measured in.
        share: of the compared micro-gradients accepted, at most, under the recommended tau.
        chance: of pure noise passing a comparison, at most, under the recommended tau.
        tell: is called with the progress.

    Raises:
        ConfigError, DataError, OSError: if an argument cannot be used.
        Diverged: if the training before a probe diverges.
        ValueError: if too few micro-gradients can be used.
    """
    check_probe(config, after, rows, slices, share, chance)
    training = Training(dataclasses.replace(config, engine="plain"), data_folder)
    check_room(training, rows, slices)
    for steps in sorted(set(after)):
        while training.step < steps:
            training.macro_batch()
            tell("training", training.step, steps)
        probe = probe_now(training, rows, slices, tell)
        taken = int(training.accumulator.stats()["stepped"])
        for m in multiples(probe):
            advice = probe.recommend(share, chance, m)
            ends = intervals(probe, advice.tau, share, chance) if m == 1 else (None, None)
            yield ProbePoint(steps, taken, m, probe, advice, *ends)


def probe_now(training: Training, rows: int, slices: int, tell: Tell = silent) -> Probe:
    """The probe of a training at its current step, on the micro-batches that would come next."""
    config = training.config
    objective = copy.deepcopy(training.objective)  # elr's moves with every loss
    numbers = itertools.count(1)

    def loss_and_tell(step: int, i: int) -> Tensor:
        tell(f"probing at step {training.step:,}", next(numbers), rows * slices)
        return micro_batch_loss(training, objective, step, i)

    first = training.step * config.k
    places = [divmod(number, config.k) for number in range(first, first + rows)]
    losses = [partial(loss_and_tell, step, i) for step, i in places]
    return probe_losses(training.model, losses, config.b, config.k, slices)


def micro_batch_loss(training: Training, objective: Any, step: int, i: int) -> Tensor:
    x, y = training.problem.micro_batch(step, i)
    lower = training.config.autocast == "bfloat16"
    with torch.autocast(training.device.type, torch.bfloat16, enabled=lower):
        found: Tensor = objective(training.model, x, y, training.problem.index(step, i), step, i)
    return found


def multiples(probe: Probe) -> list[int]:
    """How many rows to merge: as long as each half has two macro-batches left."""
    return [m for m in MULTIPLES if m == 1 or len(probe) // m >= 4 * probe.k]


def intervals(
    probe: Probe, tau: float, share: float, chance: float
) -> tuple[list[float] | None, list[float] | None]:
    """95% intervals of the recommended tau, and of what `tau` accepts of the other half.

    By the jackknife over an eighth of each half. None if fewer rows would be left than the halves
    need.
    """
    half = len(probe) // 2
    if half < 2 * JACKKNIFE_PARTS or half - half // JACKKNIFE_PARTS - 1 < probe.k:
        return None, None
    parts = [leave_out(probe, part) for part in range(JACKKNIFE_PARTS)]
    taus = [one.recommend(share, chance).tau for one in parts]
    accepted = [one.measured(tau).rows for one in parts]
    return (
        jackknife_interval(tau, taus, 2),
        jackknife_interval(probe.measured(tau).rows, accepted, 1),
    )


def leave_out(probe: Probe, part: int) -> Probe:
    """The probe without every eighth row of each half."""
    half = len(probe) // 2
    places = [i if i < half else i - half for i in range(len(probe))]
    left = torch.tensor([i for i, at in enumerate(places) if at % JACKKNIFE_PARTS != part])
    return Probe(probe.b, probe.k, probe.gram[left][:, left], {}, probe.absent)


def jackknife_interval(value: float, less: Sequence[float], highest: float) -> list[float]:
    """From a value, and the values without each of the parts; within [0, highest]."""
    mean = sum(less) / len(less)
    error = math.sqrt((len(less) - 1) / len(less) * sum((one - mean) ** 2 for one in less))
    return [max(0.0, value - STUDENT * error), min(highest, value + STUDENT * error)]


def check_room(training: Training, rows: int, slices: int) -> None:
    """Refuses rows, or their Gram matrices, that do not fit into memory."""
    sizes = [p.numel() for p in training.model.parameters()]
    what = f"rows = {rows:,} micro-gradients of {sum(sizes):,} numbers, in {slices:,} slices"
    largest_slice = max(sum(sizes) // slices, *sizes)  # a parameter stays whole
    size = rows * largest_slice * 4 + rows * rows * 8 * (len(sizes) + 1)
    environment.check_memory(what, size, "Lower rows, or raise slices.")


def check_probe(
    config: TrainConfig,
    after: Sequence[int],
    rows: int,
    slices: int,
    share: float = 0.5,
    chance: float = 0.05,
) -> None:
    if config.k < 2:
        raise ConfigError(
            f"k must be at least 2 for a probe; got {config.k}. "
            "One micro-gradient has nothing to agree with."
        )
    if config.sam:
        raise ConfigError(
            f"sam must be 0 for a probe; got {config.sam}. "
            "The probe measures gradients at the weights themselves."
        )
    if not after or min(after) < 0 or max(after) >= MOST_STEPS:
        raise ConfigError(
            f"after must name steps of training, at least 0 and fewer than {MOST_STEPS:,}; "
            f"got {list(after)}. 0 is the initial weights."
        )
    least = max(8, 2 * config.k)
    if rows < least:
        raise ConfigError(
            f"rows must be at least 8 and twice k, which is {config.k}; got {rows}. "
            f"Give --rows {max(128, least)}, or lower --k."
        )
    if not 1 <= slices <= MOST_SLICES:
        raise ConfigError(f"slices must lie in [1, {MOST_SLICES}]; got {slices}. 1 is fastest.")
    for name, value, usual in (("share", share, 0.5), ("chance", chance, 0.05)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} must lie in (0, 1); got {value}. The default is {usual}.")
