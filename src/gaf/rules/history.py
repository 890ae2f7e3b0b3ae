"""What is usual: running means of k rows and their common scatter, as plain numbers."""

import math
from collections.abc import Sequence
from typing import Any

WARM_UP = 20  # steps after which what was seen counts as usual

Values = Sequence[float]  # one for each row; NaN where it is not known


class History:
    """Each row's running mean, and the standard deviation around it, which the rows share.

    The first steps count alike; later ones fade. The scatter is measured against the means before a
    step, so that a trend is part of it.

    Args:
        steps: how many steps the averages look back, about.
        least: the standard deviation is never less, so that equal values have one.

    Attributes:
        means: of each row; 0 before the first step.
        seen: steps that were learned from.
    """

    def __init__(self, steps: float, least: float) -> None:
        self.steps, self.least = steps, least
        self.means: list[float] = []
        self.variance, self.seen = 0.0, 0

    @property
    def deviation(self) -> float:
        return max(math.sqrt(self.variance), self.least)

    def fit(self, k: int) -> None:
        """Makes place for k rows. Those of another number are others: all start from the mean."""
        if len(self.means) != k:
            mean = sum(self.means) / len(self.means) if self.means else 0.0
            self.means = [mean] * k

    def scores(self, values: Values) -> list[float]:
        """How many standard deviations each value lies above its row's mean."""
        self.fit(len(values))
        pairs = zip(values, self.means, strict=True)
        return [(value - mean) / self.deviation for value, mean in pairs]

    def learn(self, values: Values) -> None:
        """Adds one step; a row whose value is NaN keeps its mean."""
        self.fit(len(values))
        rate = max(1 / (self.seen + 1), 1 / self.steps)
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        if not known:
            return
        if self.seen:
            square = sum((values[i] - self.means[i]) ** 2 for i in known) / len(known)
            self.variance += max(1 / self.seen, 1 / self.steps) * (square - self.variance)
        for i in known:
            self.means[i] += rate * (values[i] - self.means[i])
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self.means), "variance": self.variance, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = list(state["means"])
        self.variance, self.seen = state["variance"], state["seen"]


def medians_of_others(values: Values) -> list[float]:
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
