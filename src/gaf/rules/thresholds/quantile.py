"""tau that follows a share of accepted rows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaf.arguments import ABOVE_0
from gaf.rules.sequential import Seen
from gaf.rules.thresholds.base import Threshold, check_range
from gaf.shapes import Float64


@dataclass(eq=False)
class QuantileTau(Threshold):
    """tau that is moved until the share p of the compared rows is accepted.

        tau <- tau + rate (p - share accepted)        if rows were compared

    A constant p loses what the paper's fixed tau has: acceptance that falls as memorising begins.
    So p may decay, and tau has a cap.

    Args:
        p: share of the compared rows to accept, in [0, 1]. Higher filters less.
        half_life: steps in which p halves, above 0; None for a constant p.
        cap: tau rises no further, in [0, 2]. At 1 rows that oppose the sum are never accepted.
        rate: what tau moves by for each unit of share, above 0. Higher follows faster and less
            steadily.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: if an argument is out of its range.
    """

    p: float = 0.3
    half_life: float | None = None
    cap: float = 1.0
    rate: float = 0.02
    initial: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "p", 0, 1)
        if self.half_life is not None:
            check_range(self, "half_life", ABOVE_0, math.inf)
        check_range(self, "cap", 0, 2)
        check_range(self, "rate", ABOVE_0, math.inf)
        check_range(self, "initial", 0, 2)

    def first_state(self) -> list[float]:
        return [min(self.initial, self.cap), self.p]

    def tau_from(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        return state[0]

    def next_state(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        tau, p = state
        compared = seen.signals.isfinite()
        share = (seen.accepted & compared).sum() / compared.sum()
        tau = (tau + self.rate * (p - share)).clamp(0, self.cap)
        decay = 1.0 if self.half_life is None else 0.5 ** (1 / self.half_life)
        return torch.stack([tau, p * decay])
