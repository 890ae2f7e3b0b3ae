"""What `Guard` takes for usual: norms of the rows, and of their average, as logarithms."""

import math
from typing import Any

from gaf.rules.finding import Finding
from gaf.rules.history import WARM_UP, History, Values, medians_of_others

MEMORY = 100  # steps that a history looks back
LEAST_DEVIATION = 0.1  # of log norms: rows that never differed may differ by a tenth


class NormWatch:
    """Finds rows that are far longer than the others, and than they were.

    Args:
        ratio: to the median of the others' norms.
        z: standard deviations above the usual norm.
    """

    def __init__(self, ratio: float, z: float) -> None:
        self.ratio, self.z = ratio, z
        self.own = History(MEMORY, LEAST_DEVIATION)
        self.relative = History(MEMORY, LEAST_DEVIATION)

    def find(self, norms: Values) -> list[Finding]:
        """norms: of k rows, logarithms; NaN for rows without one, which are not compared."""
        others = medians_of_others(norms)
        relative = [norm - other for norm, other in zip(norms, others, strict=True)]
        far = self._are_far(norms, relative)
        return [
            Finding(i, "norm", math.exp(norms[i]), math.exp(others[i]))
            for i in range(len(norms))
            if far[i]
        ]

    def _are_far(self, norms: Values, relative: Values) -> list[bool]:
        limit = math.log(self.ratio)
        if self.own.seen < WARM_UP:
            return [x > 2 * limit for x in relative]
        own, between = self.own.scores(norms), self.relative.scores(relative)
        scores = map(min, own, between)
        return [x > limit and z > self.z for x, z in zip(relative, scores, strict=True)]

    def learn(self, norms: Values) -> None:
        """Adds one step; NaN for rows that are broken."""
        others = medians_of_others(norms)
        self.own.learn(norms)
        self.relative.learn([norm - other for norm, other in zip(norms, others, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return {"own": self.own.state_dict(), "relative": self.relative.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.load_state_dict(state["own"])
        self.relative.load_state_dict(state["relative"])


class StepWatch:
    """Finds steps whose average is far longer than it was.

    Args:
        z: standard deviations above the usual norm.
    """

    def __init__(self, z: float) -> None:
        self.z = z
        self.history = History(MEMORY, LEAST_DEVIATION)

    def excess(self, norm: float) -> float:
        """By how much a norm is above the limit, as logarithms; 0 if it is below."""
        if self.history.seen < WARM_UP or math.isnan(norm):
            return 0.0
        return max(0.0, norm - self.usual - self.z * self.history.deviation)

    @property
    def usual(self) -> float:
        return self.history.means[0]

    def learn(self, norm: float) -> None:
        """Adds one step; one above the limit counts as if it were at the limit."""
        self.history.learn([norm - self.excess(norm)])

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)
