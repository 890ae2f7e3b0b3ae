"""The numbers of a report: means over seeds, paired differences between arms, and curves.

Only finished runs are compared. An arm without any is described by its unfinished runs, and takes
part in no difference. Runs that share arm and seed are averaged first, so n always counts seeds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure, value_in

Values = NDArray[np.float64]

MIN_SEEDS = 3  # seeds: with fewer, no difference is claimed
LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over n seeds; no deviation for n = 1."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None without values."""
        array = np.array(list(values), dtype=np.float64)
        if not array.size:
            return None
        deviation = float(array.std(ddof=1)) if array.size > 1 else None
        return cls(float(array.mean()), deviation, array.size)


@dataclass(frozen=True)
class Difference:
    """arm - other in one measure, over the n seeds that both finished.

    Attributes:
        mean: in the measure's unit, so in [-1, 1] for a share.
        low, high: paired bootstrap interval of the mean, at 95%; None for n = 1.
    """

    arm: str
    other: str
    measure: Measure
    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether the arms differ clearly: three seeds or more, and an interval without 0."""
        if self.low is None or self.high is None:
            return False
        return self.n >= MIN_SEEDS and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Curve:
    """Values of the evaluations over samples, steps or seconds x (p,).

    mean, low, high (p,): the mean over n runs, and their lowest and highest value.
    """

    x: Values
    mean: Values
    low: Values
    high: Values
    n: int


def values_by_seed(runs: Iterable[Run], measure: Measure) -> dict[int, float]:
    """The measure per seed, if there is a value; the mean of runs that share a seed."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value = measure.value(run)
        if value is not None:
            values.setdefault(run.seed, []).append(value)
    return {seed: float(np.mean(group)) for seed, group in values.items()}


def spread_over_seeds(arm: Arm, measure: Measure) -> Spread | None:
    """Mean and spread over the arm's seeds; None if no run has a value."""
    return Spread.of(values_by_seed(arm.counted_runs, measure).values())


def paired_difference(arm: Arm, other: Arm, measure: Measure) -> Difference | None:
    """arm - other, paired by seed; None if they have no finished seed in common."""
    mine = values_by_seed(arm.finished_runs, measure)
    theirs = values_by_seed(other.finished_runs, measure)
    seeds = sorted(mine.keys() & theirs.keys())
    gaps = np.array([mine[seed] - theirs[seed] for seed in seeds], dtype=np.float64)
    if not gaps.size:
        return None
    low, high = bootstrap(gaps) if gaps.size > 1 else (None, None)
    return Difference(arm.name, other.name, measure, float(gaps.mean()), low, high, gaps.size)


def bootstrap(values: Values, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (n,), n >= 1.

    From the means of n draws with replacement. It is too narrow for few seeds, and the page says
    so. With n = 2 or 3 it is the range of the values itself: one resample in n^n repeats the
    lowest value n times, which is more than the 2.5% that are cut off.
    """
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def values_along(run: Run, key: str, x: str = "samples") -> tuple[Values, Values]:
    """x (p,), strictly rising, and the key's values there (p,), of the evaluations that have both.

    Of several evaluations at the same x, with no step taken between them, the last counts.
    """
    values: dict[float, float] = {}
    for line in run.evals:
        value = value_in(run, line, key)
        if value is not None and line.get(x) is not None:
            values[float(line[x])] = value
    places = sorted(values)
    heights = [values[place] for place in places]
    return np.array(places, dtype=np.float64), np.array(heights, dtype=np.float64)


def curve(arm: Arm, key: str, x: str = "samples") -> Curve | None:
    """The key over samples seen, or over "steps_taken" or "seconds", of the arm's counted runs.

    x holds the evaluation points of all runs. Each run is interpolated linearly between its own
    points and not continued beyond them, so the curve covers what all runs with values share;
    None if that is nothing. If early stopping ended the runs, each keeps its last value to the
    end of the longest: the value of the weights that were restored.
    """
    tracks = [values_along(run, key, x) for run in arm.counted_runs]
    tracks = [(across, up) for across, up in tracks if across.size]
    if not tracks:
        return None
    starts, ends = zip(*((across[0], across[-1]) for across, _ in tracks), strict=True)
    stop = max(ends) if stopped_early(arm) else min(ends)
    grid = np.unique(np.concatenate([across for across, _ in tracks]))
    grid = grid[(grid >= max(starts)) & (grid <= stop)]
    if not grid.size:
        return None
    values = np.stack([np.interp(grid, across, up) for across, up in tracks])
    return Curve(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(tracks))


def stopped_early(arm: Arm) -> bool:
    """Whether all counted runs have ended, with early stopping."""
    runs = arm.counted_runs
    return all(run.end and run.header["config"].get("early_stopping") for run in runs)
