"""Norms that are far from usual: of rows, and of their average. They are held as logarithms."""

import math
from collections.abc import Sequence
from typing import Any

from gaf.rules.finding import Finding

WARM_UP = 20  # steps after which what was seen counts as usual
FADE = 1 / 500  # by how much the largest log norm of late falls at each step
LOOKS_BACK = 100  # steps of the usual norm of the average
LEAST_DEVIATION = 0.1  # of that log norm: a run that never varied may vary by a tenth


class NormWatch:
    """Finds rows that are far longer than the others, and than any other row of late.

    Not a z-score: with small micro-batches that are nearly learned, norms scatter by a factor of
    ten, and six standard deviations are a factor of a million. No row raises the limit that it is
    judged by, unless there are two: then its own past counts too, and shows which has changed.

    Args:
        ratio: to the median of the others' norms, and to the largest norm of the others of late.

    In the first 20 steps it is the ratio squared.

    Attributes:
        largest: of any row of late; it falls by half in 350 steps.
        holder: the row that it is of.
        second: the largest of any other row of late.
        seen: steps that were learned from.
    """

    def __init__(self, ratio: float) -> None:
        self.limit = math.log(ratio)
        self.largest, self.holder, self.second, self.seen = -math.inf, 0, -math.inf, 0

    def find(self, norms: Sequence[float]) -> list[Finding]:
        """norms: of k rows; NaN for rows without one, which are not compared."""
        others = medians_of_others(norms)
        return [
            Finding(i, "norm", math.exp(norm), math.exp(other))
            for i, (norm, other) in enumerate(zip(norms, others, strict=True))
            if self._is_far(norm, other, self._largest_beside(i, len(norms)))
        ]

    def _largest_beside(self, row: int, k: int) -> float:
        return self.second if row == self.holder and k > 2 else self.largest

    def _is_far(self, norm: float, other: float, largest: float) -> bool:
        limit = self.limit if self.seen >= WARM_UP else 2 * self.limit
        return min(norm - other, norm - largest) > limit

    def learn(self, norms: Sequence[float]) -> None:
        """Adds one step; NaN for rows that are broken."""
        known = [(norm, i) for i, norm in enumerate(norms) if not math.isnan(norm)]
        if not known:
            return
        self.largest, self.second = self.largest - FADE, self.second - FADE
        for norm, i in known:
            if norm > self.largest:
                if i != self.holder:
                    self.second = self.largest
                self.largest, self.holder = norm, i
            elif i != self.holder:
                self.second = max(self.second, norm)
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        names = ("largest", "holder", "second", "seen")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.largest, self.holder = state["largest"], state["holder"]
        self.second, self.seen = state["second"], state["seen"]


class StepWatch:
    """Finds steps whose average is far longer than usual (as ZClip, arXiv 2504.02507).

    Args:
        z: standard deviations above the usual log norm.

    Attributes:
        usual: the running mean; the first steps count alike, and later ones fade.
        variance: around it, as it was before each step.
        seen: steps that were learned from.
    """

    def __init__(self, z: float) -> None:
        self.z = z
        self.usual, self.variance, self.seen = 0.0, 0.0, 0

    def excess(self, norm: float) -> float:
        """By how much a norm is above the limit; 0 if it is below, or unknown."""
        if self.seen < WARM_UP or math.isnan(norm):
            return 0.0
        deviation = max(math.sqrt(self.variance), LEAST_DEVIATION)
        return max(0.0, norm - self.usual - self.z * deviation)

    def learn(self, norm: float) -> None:
        """Adds one step; a norm above the limit counts as if it were at the limit."""
        if math.isnan(norm):
            return
        distance = norm - self.excess(norm) - self.usual
        self.seen += 1
        rate = max(1 / self.seen, 1 / LOOKS_BACK)
        self.usual += rate * distance
        if self.seen > 1:
            self.variance += max(1 / (self.seen - 1), 1 / LOOKS_BACK) * (
                distance**2 - self.variance
            )

    def state_dict(self) -> dict[str, Any]:
        return {"usual": self.usual, "variance": self.variance, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual, self.variance, self.seen = state["usual"], state["variance"], state["seen"]


def find_not_finite(norms2: Sequence[float]) -> list[Finding]:
    return [
        Finding(i, "not finite", value, math.nan)
        for i, value in enumerate(norms2)
        if not math.isfinite(value)
    ]


def medians_of_others(values: Sequence[float]) -> list[float]:
    """For each value the lower median of the other known ones; NaN where there is none."""
    order = sorted((i for i, v in enumerate(values) if not math.isnan(v)), key=lambda i: values[i])
    places = {i: place for place, i in enumerate(order)}
    medians = [math.nan] * len(values)
    for i in range(len(values)):
        others = len(order) - (i in places)
        if others:
            middle = (others - 1) // 2
            # the row's own place is skipped
            middle += i in places and places[i] <= middle
            medians[i] = values[order[middle]]
    return medians
