"""tau from the noise floor: how much two rows of noise alone agree by chance."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gaf.rules.agreement import mean_of_others, noise_squared
from gaf.rules.gram import is_present
from gaf.rules.sequential import Seen
from gaf.rules.thresholds.base import LOOK_BACK, Threshold, check_range, fade, mean_norm2
from gaf.shapes import Bool, Float64


@dataclass(eq=False)
class NoiseFloorTau(Threshold):
    """tau from the noise floor: how much two rows of noise alone would agree by chance.

        tau = 1 - z / sqrt(d_eff)        d_eff = tr(Sigma)^2 / tr(Sigma^2)

        tr(Sigma) / b      mean diagonal - mean off-diagonal of K
        tr(Sigma^2) / b^2  mean of (K_13 - K_14 - K_23 + K_24)^2 / 4 over quadruples of rows; with
                           fewer than four rows the variance over steps of K_12, which holds
                           2 g' Sigma g / b too

    all over the present rows of a step, in units of their mean |g_i|^2, and averaged over the last
    steps.

    Rows that share a signal well above the floor pass; once nothing but noise is left, none does.
    Keeps all k rows.

    Args:
        z: standard deviations above chance that are required, at least 0. Higher filters more; 2
            lets 2% of pure noise pass.
        window: steps that the averages look back, at least 1. Higher is steadier and slower.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: if an argument is out of its range.
    """

    z: float = 2.0
    window: float = LOOK_BACK
    initial: float = 1.0
    needs_gram: ClassVar[bool] = True
    older_size: ClassVar[int] = 5

    def __post_init__(self) -> None:
        check_range(self, "z", 0, math.inf)
        check_range(self, "window", 1, math.inf)
        check_range(self, "initial", 0, 2)

    def first_state(self) -> list[float]:
        # weight of the steps, tr(Sigma) / b, K_12 and its square;
        # weight of the steps with quadruples, tr(Sigma^2) / b^2
        return [0.0] * 6

    def tau_from(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        steps, trace, inner, square, full, quadruples = state
        variance = square / steps - (inner / steps) ** 2
        square_trace = torch.where(full > 0, quadruples / full, variance)
        floor = (square_trace.clamp_min(0).sqrt() / (trace / steps)).clamp(0, 1)  # 1 / sqrt(d_eff)
        known = (steps > 0) & (trace > 0) & (square_trace > 0)
        return torch.where(known, 1 - self.z * floor, self.initial)

    def next_state(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        assert seen.gram is not None
        sound = is_present(seen.norms2)
        K = torch.where(sound & sound[:, None], seen.gram, 0.0) / mean_norm2(seen)
        r = sound.sum()
        signal, first = mean_of_others(K, r), first_pair(K, sound)
        trace = K.diagonal().sum() / r - signal
        full = r >= 4
        quadruples = torch.where(full, noise_squared(K, r), 0.0)
        one = torch.ones_like(signal)
        step = torch.stack([one, trace, first, first**2, full.double(), quadruples])
        return fade(state, torch.where(r > 1, step, math.nan), self.window)

    def from_first_version(self, state: list[float]) -> list[float]:
        steps, trace, quadruples, inner, square = state
        if not (steps > 0 and trace > 0):
            return self.first_state()
        unit, full = trace / steps, steps if quadruples else 0.0
        return [steps, steps, inner / unit, square / unit**2, full, quadruples / unit**2]


def first_pair(K: Float64[Tensor, "k k"], sound: Bool[Tensor, " k"]) -> Float64[Tensor, ""]:
    """K_12 of the first two rows that are present; 0 for fewer."""
    place = sound.cumsum(0)
    one, two = sound & (place == 1), sound & (place == 2)
    return torch.where(one & two[:, None], K, 0.0).sum()
