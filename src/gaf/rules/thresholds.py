"""Thresholds that adapt: tau as a function of what the steps so far have shown.

tau does not transfer between tasks, because the distances that it is held against do not: two micro-gradients
g_i = g + e_i with Cov(e_i) = Sigma / b have an expected cosine of

    E[cos] = b / (b + B)        B = tr(Sigma) / |g|^2, the gradient noise scale (McCandlish et al., arXiv 1812.06162)

and two that are noise alone have a cosine of mean 0 and variance 1 / d_eff, d_eff = tr(Sigma)^2 / tr(Sigma^2). A threshold object
takes the place of a number, `gaf.GAF(tau=gaf.SignalTau())`. It looks at the decisions of earlier steps only, at numbers that every
rank has anyway: it costs no communication, is the same on all ranks, never asks the host for anything, and its state is one small
vector on the rows' device, changed in place so that a captured CUDA graph may hold it.

tau is of angles, and so is what they learn: each step's inner products count in units of that step's own mean |g_i|^2. A loss scale
that a GradScaler moves, or a step of huge gradients, makes no difference to it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from gaf.arguments import ABOVE_0, is_number, real_number
from gaf.rules.agreement import mean_of_others, noise_squared
from gaf.rules.gram import present
from gaf.rules.sequential import Seen
from gaf.shapes import Float64

WINDOW = 50.0  # steps that averages look back
VERSION = 2  # of a state; in the first, inner products counted in the units of the rows
RANGES = {  # of the arguments, whichever kind has them
    "kappa": (0, math.inf), "z": (0, math.inf), "p": (0, 1), "half_life": (ABOVE_0, math.inf), "margin": (-1, 1), "cap": (0, 2),
    "rate": (ABOVE_0, math.inf), "window": (1, math.inf), "initial": (0, 2), "tau": (0, 2),
}  # fmt: skip


@dataclass(eq=False)
class Threshold:
    """What the kinds below share. One object serves one policy: its state follows that policy's decisions.

    A kind gives its first state, tau as a function of the state, and the state after a step.
    """

    # whether it learns from the rows' Gram matrix, so that they cannot stream by
    needs_gram: ClassVar[bool] = False
    older_size: ClassVar[int] = 0  # of a state of the first version, where it was another
    _state: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in RANGES and not (value is None and one.default is None):
                setattr(self, one.name, checked_number(self, one.name, value))

    def first(self) -> list[float]:
        raise NotImplementedError

    def rule(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        raise NotImplementedError

    def after(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        raise NotImplementedError

    def on(self, device: torch.device) -> Float64[Tensor, ""]:
        """tau of the step at hand, () on the device."""
        return self.rule(self.state_on(device)).clamp(0, 2)

    def learn(self, seen: Seen) -> None:
        """Takes in one decision. What cannot be measured leaves the state as it was."""
        state = self.state_on(seen.norms2.device)
        after = self.after(state, seen)
        state.copy_(torch.where(after.isfinite(), after, state))

    def state_on(self, device: torch.device) -> Float64[Tensor, " m"]:
        """What was learned, (m,): the one tensor that a step changes, in its place."""
        if self._state is None:
            self._state = torch.tensor(self.first(), dtype=torch.float64, device=device)
        if self._state.device != device:
            self._state = self._state.to(device)
        return self._state

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "state": None if self._state is None else self._state.tolist(),
            "version": VERSION,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, also that of a version before, at the same tau.

        Raises:
            ValueError: for the state of another kind.
        """
        name, kind = type(self).__name__, state.get("kind") if isinstance(state, dict) else None
        if kind != name:
            raise ValueError(f"{name}: the state must be of the same kind of threshold; it is of {kind if kind else repr(state)}. "
                             "Build the policy as it was when it was saved.")  # fmt: skip
        vector = torch.tensor(self._numbers(state), dtype=torch.float64, device="cpu")
        if self._state is None:
            self._state = vector
        else:
            self._state.copy_(vector)  # a captured graph may hold it

    def _numbers(self, state: dict[str, Any]) -> list[float]:
        """What a saved state holds, as this version has it."""
        numbers = state.get("state")
        if numbers is None:
            return self.first()
        older = state.get("version", 1) < VERSION
        size = self.older_size if older and self.older_size else len(self.first())
        if not isinstance(numbers, list | tuple) or len(numbers) != size:
            raise ValueError(f"{type(self).__name__}: the state must hold {size} numbers; it holds {numbers!r}. "
                             "Load what state_dict() gave, whole.")  # fmt: skip
        return self.from_first_version(list(numbers)) if older else list(numbers)

    def from_first_version(self, state: list[float]) -> list[float]:
        """The state that means the same, from one that was saved by the first version."""
        return state


def faded(total: Tensor, value: Tensor, window: float) -> Tensor:
    """A sum over steps in which each counts 1 - 1 / window times as much as the one after it."""
    return total * (1 - 1 / window) + value


def mean_norm2(seen: Seen) -> Float64[Tensor, ""]:
    """Over present rows; NaN where there is none."""
    return torch.where(present(seen.norms2), seen.norms2, math.nan).nanmean()


@dataclass(eq=False)
class SignalTau(Threshold):
    """tau from the signal: what two rows have in common, as far as the gradient noise scale tells.

        tau = 1 - kappa E[cos]        E[cos] = b / (b + B) = |g|^2 / E|g_i|^2

    a ratio of means over the rows of a step, averaged over the last steps. It needs no b. As memorising sets in B grows, and tau with it.

    Args:
        kappa: share of the expected cosine that is asked for, at least 0. Higher filters more; 1 rejects about half.
        window: steps that the averages look back, at least 1. Higher is steadier and slower.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: where an argument is out of its range.
    """

    kappa: float = 1.0
    window: float = WINDOW
    initial: float = 1.0

    def first(self) -> list[float]:
        return [0.0, 0.0]  # the expected cosine, weight of the steps

    def rule(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        cosine, steps = state
        return torch.where(steps > 0, 1 - self.kappa * (cosine / steps).clamp(0, 1), self.initial)

    def after(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        cosine = seen.signals.nanmean() / mean_norm2(seen)
        return faded(state, torch.stack([cosine, 1 + 0 * cosine]), self.window)  # both or none

    def from_first_version(self, state: list[float]) -> list[float]:
        signal, norm2 = state  # as much weight as many steps have
        return [self.window * signal / norm2, self.window] if norm2 > 0 else self.first()


@dataclass(eq=False)
class NoiseFloorTau(Threshold):
    """tau from the noise floor: how much two rows of noise alone would agree by chance.

        tau = 1 - z / sqrt(d_eff)        d_eff = tr(Sigma)^2 / tr(Sigma^2)

        tr(Sigma) / b      mean diagonal - mean off-diagonal of K
        tr(Sigma^2) / b^2  mean of (K_13 - K_14 - K_23 + K_24)^2 / 4 over quadruples of rows; with less than four the variance
                           over steps of K_12, which holds 2 g' Sigma g / b too

    all over the present rows of a step, in units of their mean |g_i|^2, and averaged over the last steps.

    Rows that share a signal well above the floor pass; as soon as nothing but noise is left, none does. Keeps all k rows.

    Args:
        z: standard deviations above chance that are asked for, at least 0. Higher filters more; 2 lets 2% of pure noise pass.
        window: steps that the averages look back, at least 1. Higher is steadier and slower.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: where an argument is out of its range.
    """

    z: float = 2.0
    window: float = WINDOW
    initial: float = 1.0
    needs_gram: ClassVar[bool] = True
    older_size: ClassVar[int] = 5

    def first(self) -> list[float]:
        # weight of the steps, tr(Sigma) / b, K_12 and its square; weight of those with quadruples, tr(Sigma^2) / b^2
        return [0.0] * 6

    def rule(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        steps, trace, inner, square, full, quadruples = state
        variance = square / steps - (inner / steps) ** 2
        square_trace = torch.where(full > 0, quadruples / full, variance)
        floor = (square_trace.clamp_min(0).sqrt() / (trace / steps)).clamp(0, 1)  # 1 / sqrt(d_eff)
        return torch.where(
            (steps > 0) & (trace > 0) & (square_trace > 0), 1 - self.z * floor, self.initial
        )

    def after(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        assert seen.gram is not None
        sound = present(seen.norms2)
        K = torch.where(sound & sound[:, None], seen.gram, 0.0) / mean_norm2(seen)
        r, place = sound.sum(), sound.cumsum(0)
        inner = mean_of_others(K, r)
        one, two = sound & (place == 1), sound & (place == 2)
        first = torch.where(one & two[:, None], K, 0.0).sum()  # of the first two that are present
        full = r >= 4
        quadruples = torch.where(full, noise_squared(K, r), 0.0)
        known = [torch.ones_like(inner), K.diagonal().sum() / r - inner, first, first**2, full.double(), quadruples]  # fmt: skip
        return faded(state, torch.where(r > 1, torch.stack(known), math.nan), self.window)

    def from_first_version(self, state: list[float]) -> list[float]:
        steps, trace, quadruples, inner, square = state
        if not (steps > 0 and trace > 0):
            return self.first()
        unit, full = trace / steps, steps if quadruples else 0.0
        return [steps, steps, inner / unit, square / unit**2, full, quadruples / unit**2]


@dataclass(eq=False)
class QuantileTau(Threshold):
    """tau that is moved until the share p of the compared rows is accepted.

        tau <- tau + rate (p - share accepted)        where rows were compared

    A constant p loses what the paper's fixed tau has: acceptance that falls as memorising sets in. So p may decay, and
    tau has a cap.

    Args:
        p: share of the compared rows to accept, in [0, 1]. Higher filters less.
        half_life: steps in which p halves, above 0; None for a constant p.
        cap: tau rises no further, in [0, 2]. At 1 rows that oppose the sum are never accepted.
        rate: what tau moves by for each unit of share, above 0. Higher follows faster and less steadily.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: where an argument is out of its range.
    """

    p: float = 0.3
    half_life: float | None = None
    cap: float = 1.0
    rate: float = 0.02
    initial: float = 1.0

    def first(self) -> list[float]:
        return [min(self.initial, self.cap), self.p]

    def rule(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        return state[0]

    def after(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        tau, p = state
        compared = seen.signals.isfinite()
        share = (seen.accepted & compared).sum() / compared.sum()
        tau = (tau + self.rate * (p - share)).clamp(0, self.cap)
        return torch.stack(
            [tau, p * (1.0 if self.half_life is None else 0.5 ** (1 / self.half_life))]
        )


@dataclass(eq=False)
class MovingAverageTau(Threshold):
    """tau from the distances themselves: their average over the last steps, less a margin.

        tau = mean distance of the compared rows - margin

    Args:
        margin: how far below the average a distance must lie, in [-1, 1]. Higher filters more; at 0 about half pass.
        cap: tau rises no further, in [0, 2]. At 1 rows that oppose the sum are never accepted.
        window: steps that the average looks back, at least 1. Higher is steadier and slower.
        initial: tau of the first step, in [0, 2].

    Raises:
        ValueError: where an argument is out of its range.
    """

    margin: float = 0.0
    cap: float = 1.0
    window: float = WINDOW
    initial: float = 1.0

    def first(self) -> list[float]:
        return [0.0, 0.0]  # weight of the steps, their mean distances

    def rule(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        steps, distance = state
        return torch.where(steps > 0, distance / steps - self.margin, self.initial).clamp_max(
            self.cap
        )

    def after(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        distance = torch.where(seen.signals.isfinite(), seen.distances, math.nan).nanmean()
        return faded(state, torch.stack([1 + 0 * distance, distance]), self.window)


@dataclass(eq=False)
class ScheduleTau(Threshold):
    """tau over the steps: straight lines between points, constant before the first and after the last. Every decision is one step.

    Args:
        points: (step, tau) pairs, or a dictionary {step: tau}, with rising steps of at least 0 and tau in [0, 2].

    Raises:
        ValueError: where the points are not such.

    >>> tau = ScheduleTau([(0, 1.0), (1000, 0.8)])
    """

    points: Sequence[tuple[float, float]] | Mapping[float, float]

    def __post_init__(self) -> None:
        self.points = [
            (float(step), float(checked_number(self, "tau", tau)))
            for step, tau in pairs_of(self.points)
        ]

    def first(self) -> list[float]:
        return [0.0]

    def rule(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        points = cast(list[tuple[float, float]], self.points)
        tau = torch.full_like(state[0], points[0][1])
        for (start, a), (end, b) in pairwise(points):
            tau = tau + (b - a) * ((state[0] - start) / (end - start)).clamp(0, 1)
        return tau

    def after(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        return state + 1


def pairs_of(points: Any) -> list[tuple[float, Any]]:
    """The (step, tau) pairs of a ScheduleTau, whose steps are numbers that rise."""
    try:
        pairs = [
            (step, tau) for step, tau in (points.items() if isinstance(points, Mapping) else points)
        ]
    except (TypeError, ValueError):  # nothing to go through, or no pairs
        pairs = []
    numbers = all(is_number(step) and 0 <= step < math.inf for step, _ in pairs)
    if not pairs or not numbers or any(a >= b for (a, _), (b, _) in pairwise(pairs)):
        raise ValueError(f"ScheduleTau: points must be (step, tau) pairs whose steps rise from 0 or more; got {points!r}. "
                         "[(0, 1.0), (1000, 0.8)] goes from 1 to 0.8 in a thousand steps.")  # fmt: skip
    return pairs


def checked_number(threshold: Threshold, name: str, value: Any) -> float:
    subject = f"{type(threshold).__name__}: {name}"
    return real_number(subject, value, *RANGES[name], "Leave it out for the default.")
