"""tau from the signal: how much two rows have in common on average."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaf.rules.sequential import Seen
from gaf.rules.thresholds.base import LOOK_BACK, Threshold, check_range, fade, mean_norm2
from gaf.shapes import Float64


@dataclass(eq=False)
class SignalTau(Threshold):
    """tau from the signal: what two rows have in common, by the gradient noise scale.

        tau = 1 - kappa E[cos]        E[cos] = b / (b + B) = |g|^2 / E|g_i|^2

    a ratio of means over the rows of a step, averaged over the last steps. b is not needed. B grows
    as memorising begins, and tau rises with it.

    Args:
        kappa: share of the expected cosine that is required, at least 0. Higher filters more; 1
            rejects about half.
        window: steps that the averages look back, at least 1. Higher is steadier and slower.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: if an argument is out of its range.
    """

    kappa: float = 1.0
    window: float = LOOK_BACK
    initial: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "kappa", 0, math.inf)
        check_range(self, "window", 1, math.inf)
        check_range(self, "initial", 0, 2)

    def first_state(self) -> list[float]:
        return [0.0, 0.0]  # the expected cosine, weight of the steps

    def tau_from(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        cosine, steps = state
        return torch.where(steps > 0, 1 - self.kappa * (cosine / steps).clamp(0, 1), self.initial)

    def next_state(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        cosine = seen.signals.nanmean() / mean_norm2(seen)
        return fade(state, torch.stack([cosine, 1 + 0 * cosine]), self.window)  # both or none

    def from_first_version(self, state: list[float]) -> list[float]:
        signal, norm2 = state
        if not norm2 > 0:
            return self.first_state()
        return [self.window * signal / norm2, self.window]  # as much weight as many steps have
