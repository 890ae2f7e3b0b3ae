"""tau that follows the number of steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from gaf.arguments import is_number, real_number
from gaf.rules.sequential import Seen
from gaf.rules.thresholds.base import Threshold
from gaf.shapes import Float64


@dataclass(eq=False)
class ScheduleTau(Threshold):
    """tau over the steps: straight lines between points, constant before them and after them.

    Every decision is one step.

    Args:
        points: (step, tau) pairs, or a dictionary {step: tau}, with rising steps of at least 0 and
            tau in [0, 2].

    Raises:
        ValueError: if the points are not such.

    >>> tau = ScheduleTau([(0, 1.0), (1000, 0.8)])
    """

    points: Sequence[tuple[float, float]] | Mapping[float, float]

    def __post_init__(self) -> None:
        self.points = [(float(step), check_tau(tau)) for step, tau in pairs_of(self.points)]

    def first_state(self) -> list[float]:
        return [0.0]

    def tau_from(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        points = cast(list[tuple[float, float]], self.points)
        tau = torch.full_like(state[0], points[0][1])
        for (start, a), (end, b) in pairwise(points):
            tau = tau + (b - a) * ((state[0] - start) / (end - start)).clamp(0, 1)
        return tau

    def next_state(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        return state + 1


def pairs_of(points: Any) -> list[tuple[float, Any]]:
    """The (step, tau) pairs of a ScheduleTau, whose steps are numbers that rise."""
    try:
        given = points.items() if isinstance(points, Mapping) else points
        pairs = [(step, tau) for step, tau in given]
    except (TypeError, ValueError):  # not iterable, or not pairs
        pairs = []
    numbers = all(is_number(step) and 0 <= step < math.inf for step, _ in pairs)
    if not pairs or not numbers or any(a >= b for (a, _), (b, _) in pairwise(pairs)):
        raise ValueError(
            "ScheduleTau: points must be (step, tau) pairs whose steps rise from 0 or more; "
            f"got {points!r}. [(0, 1.0), (1000, 0.8)] goes from 1 to 0.8 in a thousand steps."
        )
    return pairs


def check_tau(tau: Any) -> float:
    return float(real_number("ScheduleTau: tau", tau, 0, 2, "It is a cosine distance."))
