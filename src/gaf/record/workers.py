"""What each row showed over the last steps: its length, its direction, whether it was left out."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gaf.record.alarms import Worker
from gaf.record.outcome import Outcome
from gaf.record.recent import WINDOW
from gaf.shapes import Float64


class Workers:
    """Follows k rows over the last 100 steps that were measured.

    Attributes:
        left_out: for each row, how many steps were taken without it, since the start.
    """

    def __init__(self, k: int) -> None:
        self.left_out = [0] * k
        self._recent: deque[Tensor] = deque(maxlen=WINDOW)  # what `shown_by` gives

    def record(self, outcome: Outcome) -> None:
        """Adds one step."""
        if not outcome.measured:
            return
        self._recent.append(shown_by(outcome))
        for i, accepted in enumerate(outcome.accepted):
            self.left_out[i] += outcome.stepped and not accepted

    def table(self, workers: Sequence[Worker]) -> list[dict[str, Any]]:
        """See `gaf.Handle.workers`."""
        recent = self._recent or [torch.full((2, len(self.left_out)), math.nan, device="cpu")]
        norms, cosines = torch.stack(list(recent), dim=1)
        finite = torch.where(norms.isnan(), norms, norms.isfinite().double())
        means = {
            "norm": torch.where(norms.isfinite(), norms, math.nan).nanmean(0).tolist(),
            "cosine": cosines.nanmean(0).tolist(),
            "finite": finite.nanmean(0).tolist(),
            "left_out": self.left_out,
        }
        rows = zip(*means.values(), strict=True)
        pairs = zip(workers, rows, strict=False)
        return [worker.names() | dict(zip(means, row, strict=True)) for worker, row in pairs]

    def state_dict(self) -> dict[str, Any]:
        recent = [step.tolist() for step in self._recent]
        return {"left_out": list(self.left_out), "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, if it is of as many rows."""
        if len(state["left_out"]) == len(self.left_out):
            self.left_out = list(state["left_out"])
            steps = (as_float64(step) for step in state["recent"])
            self._recent = deque(steps, maxlen=WINDOW)


def shown_by(outcome: Outcome) -> Float64[Tensor, "2 k"]:
    """A step's norms relative to the median of the present rows', and its cosines.

    A norm is infinite if it is not finite, and NaN if no row is present.
    """
    present = [math.sqrt(n) for n in outcome.norms2 if 0 < n < math.inf]
    usual = median(present) if present else math.nan
    norms = [math.sqrt(n) / usual if 0 <= n < math.inf else math.inf for n in outcome.norms2]
    return as_float64([norms, outcome.cosines or [math.nan] * len(norms)])


def as_float64(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
