"""tau from the distances themselves."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaf.rules.sequential import Seen
from gaf.rules.thresholds.base import LOOK_BACK, Threshold, check_range, fade
from gaf.shapes import Float64


@dataclass(eq=False)
class MovingAverageTau(Threshold):
    """tau from the distances themselves: their average over the last steps, less a margin.

        tau = mean distance of the compared rows - margin

    Args:
        margin: how far below the average a distance must lie, in [-1, 1]. Higher filters more; at 0
            about half pass.
        cap: tau rises no further, in [0, 2]. At 1 rows that oppose the sum are never accepted.
        window: steps that the average looks back, at least 1. Higher is steadier and slower.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: if an argument is out of its range.
    """

    margin: float = 0.0
    cap: float = 1.0
    window: float = LOOK_BACK
    initial: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "margin", -1, 1)
        check_range(self, "cap", 0, 2)
        check_range(self, "window", 1, math.inf)
        check_range(self, "initial", 0, 2)

    def first_state(self) -> list[float]:
        return [0.0, 0.0]  # weight of the steps, their mean distances

    def tau_from(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        steps, distance = state
        tau = torch.where(steps > 0, distance / steps - self.margin, self.initial)
        return tau.clamp_max(self.cap)

    def next_state(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        distance = torch.where(seen.signals.isfinite(), seen.distances, math.nan).nanmean()
        return fade(state, torch.stack([1 + 0 * distance, distance]), self.window)
