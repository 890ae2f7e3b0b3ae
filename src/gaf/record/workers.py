"""What each row showed over the last steps: its length, its direction, whether it was left out."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from gaf.record.alarms import Worker
from gaf.record.outcome import Outcome
from gaf.record.recent import WINDOW, ratio

Shown = list[list[float]]  # (k, 2): a step's norms relative to their median, and its cosines


class Workers:
    """Follows k rows over the last 100 steps that were measured.

    Attributes:
        left_out: for each row, how many steps were taken without it, since the start.
    """

    def __init__(self, k: int) -> None:
        self.left_out = [0] * k
        self._recent: deque[Shown] = deque(maxlen=WINDOW)

    def record(self, outcome: Outcome) -> None:
        """Adds one step."""
        if not outcome.measured:
            return
        self._recent.append(shown_by(outcome))
        for i, accepted in enumerate(outcome.accepted):
            self.left_out[i] += outcome.stepped and not accepted

    def table(self, workers: Sequence[Worker]) -> list[dict[str, Any]]:
        """See `gaf.Handle.workers`."""
        return [worker.names() | self._row(i) for i, worker in enumerate(workers)]

    def _row(self, i: int) -> dict[str, Any]:
        norms, cosines = ([step[i][j] for step in self._recent] for j in (0, 1))
        known = [norm for norm in norms if math.isfinite(norm)]
        return {
            "norm": ratio(sum(known), len(known)),
            "cosine": mean_of_known(cosines),
            "finite": ratio(sum(norm != math.inf for norm in norms), len(norms)),
            "left_out": self.left_out[i],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": list(self.left_out), "recent": [list(step) for step in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, if it is of as many rows."""
        if len(state["left_out"]) == len(self.left_out):
            self.left_out = list(state["left_out"])
            self._recent = deque(state["recent"], maxlen=WINDOW)


def shown_by(outcome: Outcome) -> Shown:
    """A row's norm is infinite if it is not finite, and NaN if no row has a length to compare with.

    The median is that of the rows that are present.
    """
    present = [math.sqrt(n) for n in outcome.norms2 if 0 < n < math.inf]
    usual = median(present) if present else math.nan
    norms = [math.sqrt(n) / usual if 0 <= n < math.inf else math.inf for n in outcome.norms2]
    cosines = outcome.cosines or [math.nan] * len(norms)
    return [list(pair) for pair in zip(norms, cosines, strict=True)]


def mean_of_known(values: Sequence[float]) -> float:
    """The mean of the numbers that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return ratio(sum(known), len(known))
