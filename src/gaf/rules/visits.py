"""The accept rule on rows that stream by: the running sum's numbers, and what became of each row.

`Visits` holds them as tensors, on any device, without waiting for it. `PlainVisits` computes the
same in Python's own float64, for the common rule on a CPU, in a tenth of the time. Only torch's
square root can differ, by one unit in the last place.
"""

import math
from collections.abc import Iterator, Sequence
from operator import add

import torch
from torch import Tensor

from gaf.rules.gram import is_present
from gaf.rules.sequential import TIE, Seen, Sequential, norm2_after, signal_of
from gaf.shapes import Bool, Float64

Visited = tuple[bool, float, float]  # whether a row was accepted, its distance and its signal

FEW_NUMBERS = 2**12  # numbers that Python adds up faster than torch calls add up vectors of them


def visits_for(policy: Sequential, device: torch.device) -> "Visits | PlainVisits":
    """The faster one that follows the policy's rule; `device` is that of the rows' products."""
    return PlainVisits(policy) if is_plain(policy, device) else Visits(policy, device)


def is_plain(policy: Sequential, device: torch.device) -> bool:
    """Whether the policy follows the common rule, on a CPU."""
    common = type(policy).visit is Sequential.visit and type(policy).shrink is Sequential.shrink
    return device.type == "cpu" and common


def are_few(policy: Sequential, numbers: int, device: torch.device) -> bool:
    """Whether Python is the faster one to decide from so many numbers on the device."""
    return numbers <= FEW_NUMBERS and is_plain(policy, device)


def plain_walk(
    policy: Sequential, gram: Float64[Tensor, "k k"], orders: Sequence[Sequence[int]]
) -> Iterator[list[Visited]]:
    """As `gaf.rules.sequential.walk` in orders of all rows: one after the other, by row."""
    sound = is_present(gram.diagonal())
    rows = torch.where(sound & sound[:, None], gram, 0.0).tolist()
    norms2 = gram.diagonal().tolist()
    for order in orders:
        visits, inner = PlainVisits(policy), [0.0] * len(rows)
        for i in order:
            joins, shrink = visits.visit(inner[i], norms2[i])
            if joins:
                inner = list(map(add, inner, rows[i]))
            if joins and shrink != 1:
                inner = [x * shrink for x in inner]
        found = dict(zip(order, visits.rows, strict=True))
        by_row = (found[i] for i in range(len(rows)))
        yield [(joins, distance, signal) for joins, distance, _, signal in by_row]


class Visits:
    """Tensors on a device.

    Args:
        policy: gives the rule.
        device: of the rows' products.

    Attributes:
        count: rows in the running sum s.
        norm2: |s|^2.
        rows: accepted, distance, norm2 and signal of each row so far.
    """

    def __init__(self, policy: Sequential, device: torch.device) -> None:
        self.policy = policy
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.norm2 = torch.zeros((), dtype=torch.float64, device=device)
        self.rows: list[tuple[Tensor, ...]] = []

    def visit(
        self, inner: Float64[Tensor, ""] | float, own: Float64[Tensor, ""] | float
    ) -> tuple[Bool[Tensor, ""], Float64[Tensor, ""]]:
        """Whether the next row joins s, and the factor of s + g if it does.

        Args:
            inner: <s, g>.
            own: |g|^2.
        """
        count, norm2 = self.count, self.norm2
        if isinstance(inner, float) or isinstance(own, float):
            inner, own = torch.full_like(norm2, float(inner)), torch.full_like(norm2, float(own))
        joins, distance = self.policy.visit(count, inner, norm2, own)
        shrink = self.policy.shrink(count)
        self.rows.append((joins, distance, own, signal_of(self.policy, count, inner, own)))
        self.norm2 = torch.where(joins, norm2_after(norm2, inner, own, shrink), norm2)
        self.count = count + joins
        return joins, shrink

    def seen(self) -> Seen:
        """What the policy may learn from."""
        accepted, distances, norms2, signals = (
            torch.stack(c) for c in zip(*self.rows, strict=True)
        )
        return Seen(accepted, distances, norms2, signals, gram=None)

    def signal(self) -> Float64[Tensor, ""]:
        """The mean of the known signals; NaN without any."""
        return torch.stack([signal for *_, signal in self.rows]).nanmean()


class PlainVisits:
    """Plain numbers, operation by operation as in `gaf.rules.sequential`.

    Args:
        policy: gives tau, for all rows of the macro-batch, and `average`.

    Attributes:
        count, norm2, rows: as in `Visits`.
    """

    def __init__(self, policy: Sequential) -> None:
        self.tau = float(policy.tau_at(torch.device("cpu")))
        self.average = policy.average
        self.count, self.norm2 = 0, 0.0
        self.rows: list[tuple[bool, float, float, float]] = []

    def visit(self, inner: float, own: float) -> tuple[bool, float]:
        """As `Visits.visit`."""
        distance, signal = self._measure(inner, own)
        joins = distance <= self.tau + TIE
        self.rows.append((joins, distance, own, signal))
        shrink = 0.5 if self.count and self.average == "halving" else 1.0
        if joins:
            self.norm2 = max(self.norm2 + 2 * inner + own, 0.0) * shrink**2
            self.count += 1
        return joins, shrink

    def _measure(self, inner: float, own: float) -> tuple[float, float]:
        """The distance and the signal."""
        if not 0 < own < math.inf:
            return math.nan, math.nan
        if self.count == 0:
            return 0.0, math.nan
        cosine = inner / (math.sqrt(self.norm2) * math.sqrt(own)) if self.norm2 > 0 else 0.0
        terms = self.count if self.average == "mean" else 1
        return min(max(1 - cosine, 0.0), 2.0), inner / terms

    def seen(self) -> Seen:
        """As `Visits.seen`."""
        accepted, *numbers = zip(*self.rows, strict=True)
        distances, norms2, signals = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return Seen(torch.tensor(accepted, device="cpu"), distances, norms2, signals, gram=None)

    def signal(self) -> Float64[Tensor, ""]:
        """As `Visits.signal`."""
        known = [signal for *_, signal in self.rows if not math.isnan(signal)]
        mean = sum(known) / len(known) if known else math.nan
        return torch.tensor(mean, dtype=torch.float64, device="cpu")
