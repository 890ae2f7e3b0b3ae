"""Slow drifts: a worker whose values lie a little off the others', step after step.

Each row has a cumulative sum on either side (CUSUM; Page, Biometrika 41, 1954):

    d = value - mean of the others' values in the same step     about 0 for workers that are alike
    r = (d - baseline) / deviation, within [-3, 3]
    sum <- max(0, sum + r - 0.25)        and the same for -r: a drift once a sum exceeds the limit

The deviation is shared by all rows. A baseline starts at 0, so that a worker that is off from the
first step is found, and follows at 1/500 a step, so that a steady offset below about 0.45
deviations never is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gaf.rules.watch import WARM_UP

CLIP = 3.0  # a single value counts for no more deviations than that
REFERENCE = 0.25  # deviations: half of the shift that is found fastest
FOLLOW = 500  # steps in which a baseline follows
MEMORY = 100  # steps that the deviation looks back
TINY = 1e-6  # the deviation of rows that are equal


@dataclass
class Run:
    """A cumulative sum since it last was 0."""

    sum: float = 0.0
    steps: int = 0
    value: float = 0.0  # added up
    expected: float = 0.0  # added up: the others' mean

    def add(self, excess: float, value: float, expected: float) -> None:
        total = self.sum + excess
        if total <= 0:
            self.restart()
            return
        self.sum = total
        self.steps += 1
        self.value += value
        self.expected += expected

    def restart(self) -> None:
        self.sum, self.steps, self.value, self.expected = 0.0, 0, 0.0, 0.0

    @property
    def offset(self) -> float:
        """Mean distance from the others."""
        return abs(self.value - self.expected) / max(self.steps, 1)


@dataclass(frozen=True)
class Drifted:
    """A row that has drifted, and the means over the run."""

    row: int
    value: float
    expected: float
    steps: int


class Drift:
    """Finds rows whose values drift away from the others'.

    With fewer than three rows nothing is found: two rows are equally far from each other.

    Args:
        limit: of the cumulative sums, in deviations.

    Attributes:
        baselines: of each row, its usual d.
        seen: steps that were learned from.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.baselines: list[float] = []
        self.variance, self.seen = 0.0, 0
        self.runs: dict[int, list[Run]] = {1: [], -1: []}  # by the side, a run for each row

    @property
    def deviation(self) -> float:
        return max(math.sqrt(self.variance), TINY)

    @property
    def suspects(self) -> bool:
        """Whether a sum is above a sixth of the limit."""
        return any(6 * run.sum > self.limit for runs in self.runs.values() for run in runs)

    def fit(self, k: int) -> None:
        """Makes place for k rows. Those of another number are others: all start anew."""
        if len(self.baselines) != k:
            self.baselines = [0.0] * k
            self.runs = {side: [Run() for _ in range(k)] for side in (1, -1)}

    def scores(self, values: Sequence[float]) -> tuple[list[float], list[float]]:
        """Of each row: deviations above the usual value, and that value.

        0 in the first steps; 0 and NaN where it is unknown.
        """
        self.fit(len(values))
        scores, usual = [0.0] * len(values), [math.nan] * len(values)
        for i, value, others in compare(values):
            usual[i] = others + self.baselines[i]
            if self.seen >= WARM_UP:
                scores[i] = (value - usual[i]) / self.deviation
        return scores, usual

    def learn(self, values: Sequence[float]) -> list[Drifted]:
        """Adds one step and gives the rows that have drifted; then their sums start anew.

        Args:
            values: of k rows; NaN where it is not known.
        """
        compared = list(compare(values))
        if not compared:
            return []
        scores, usual = self.scores(values)
        squares, limit = 0.0, CLIP * self.deviation if self.seen >= WARM_UP else math.inf
        for i, value, others in compared:
            score = max(-CLIP, min(CLIP, scores[i]))
            for side, runs in self.runs.items():
                runs[i].add(side * score - REFERENCE, value, others)
            offset = max(-limit, min(limit, value - usual[i]))
            self.baselines[i] += offset / FOLLOW
            squares += offset**2
        self.seen += 1
        rate = max(1 / self.seen, 1 / MEMORY)
        self.variance += rate * (squares / len(compared) - self.variance)
        return self._name()

    def _name(self) -> list[Drifted]:
        """The rows that have drifted.

        A row that is off shifts the others' d to the other side; there all sums start anew.
        """
        if all(run.sum <= self.limit for runs in self.runs.values() for run in runs):
            return []
        offsets = {
            side: max((run.offset for run in runs if 2 * run.sum > self.limit), default=0.0)
            for side, runs in self.runs.items()
        }
        side = max(offsets, key=lambda one: offsets[one])
        named = []
        for i, run in enumerate(self.runs[side]):
            if 2 * run.sum > self.limit and 2 * run.offset >= offsets[side]:
                n = run.steps
                named.append(Drifted(i, run.value / n, run.expected / n, n))
                run.restart()
        for run in self.runs[-side]:
            run.restart()
        return named

    def state_dict(self) -> dict[str, Any]:
        runs = [*self.runs[1], *self.runs[-1]]
        return {
            "baselines": list(self.baselines),
            "variance": self.variance,
            "seen": self.seen,
            "runs": [[run.sum, run.steps, run.value, run.expected] for run in runs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baselines = list(state["baselines"])
        self.variance, self.seen = state["variance"], state["seen"]
        k, runs = len(self.baselines), [Run(*run) for run in state["runs"]]
        self.runs = {1: runs[:k], -1: runs[k:]}


def compare(values: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """Each known row, its value, and the mean of the others'; nothing for fewer than three rows."""
    known = [i for i, value in enumerate(values) if not math.isnan(value)]
    if len(known) < 3:
        return
    total = math.fsum(values[i] for i in known)
    for i in known:
        yield i, values[i], (total - values[i]) / (len(known) - 1)
