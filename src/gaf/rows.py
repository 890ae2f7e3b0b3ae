"""Holds the micro-gradients of one macro-batch until the decision: added up as they come, or kept apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.combine import Policy
from gaf.decision import Decision
from gaf.gram import Row, gram_of, inner_products
from gaf.policies import Sequential, norm2_after, present
from gaf.shapes import Float64
from gaf.telemetry import Evidence


def rows_for(policy: Policy, voters: Sequence[bool]) -> "Streamed | Stacked":
    if isinstance(policy, Sequential) and policy.streams:
        return Streamed(policy, voters)
    return Stacked(policy, voters)


def norm2_of_rest(row: Row, voters: Sequence[bool]) -> Tensor | float:
    """0 x |the coordinates that do not vote|^2: NaN where one of them is not finite, so that the row counts as absent."""
    rest = [t for t, votes in zip(row, voters, strict=True) if not votes]
    return 0.0 * gram_of([rest])[0, 0] if rest else 0.0


def voting(row: Row, voters: Sequence[bool]) -> Row:
    return [t for t, votes in zip(row, voters, strict=True) if votes]


class Streamed:
    """The running sum and the current row: one gradient-sized buffer beyond plain accumulation, whatever k.

    Args:
        policy: gives the accept rule (`visit`) and the verdict (`conclude`).
        voters: which parameters the decision looks at.
    """

    def __init__(self, policy: Sequential, voters: Sequence[bool]) -> None:
        self.policy, self.voters = policy, voters
        self.total: list[Tensor | None] = [None] * len(voters)  # the running sum s
        self.holds: list[list[bool]] = []  # per row, the parameters that got a gradient
        self.count = torch.zeros((), dtype=torch.int64)
        self.norm2 = torch.zeros((), dtype=torch.float64)  # |s|^2
        self.accepted: list[Tensor] = []
        self.distances: list[Tensor] = []
        self.norms2: list[Tensor] = []
        self.signals: list[Tensor] = []  # <a, g_i>, an estimate of |g|^2 for each row but the start

    def __len__(self) -> int:
        return len(self.holds)

    def add(self, row: list[Tensor | None]) -> list[Tensor | None]:
        """Visits a row. Returns its buffers that are free again.

        Only on a CPU, where a gradient's worth of memory given back and asked for anew at every micro-batch costs page
        faults, some 5% of a small network's step; on an accelerator PyTorch's own allocator keeps it at hand.
        """
        inner, own = self._measure(row)
        count, norm2 = self.count.to(own.device), self.norm2.to(own.device)
        joins, distance = self.policy.visit(count, inner, norm2, own)
        shrink = self.policy.shrink(count)
        self._absorb(row, joins | self.policy.adds_absent, shrink)
        self.holds.append([t is not None for t in row])
        self.accepted.append(joins)
        self.distances.append(distance)
        self.norms2.append(own)
        terms = count if self.policy.average == "mean" else count.clamp_max(1)
        self.signals.append(torch.where(present(own) & (count > 0), inner / terms, torch.nan))
        self.norm2 = torch.where(joins, norm2_after(norm2, inner, own, shrink), norm2)
        self.count = count + joins
        held = {id(t) for t in self.total}
        return [None if g is None or g.device.type != "cpu" or id(g) in held else g for g in row]

    def _measure(self, row: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """<s, g> and |g|^2; |s|^2 follows from those before."""
        rest, g = norm2_of_rest(row, self.voters), voting(row, self.voters)
        if not self.holds:
            (own,) = inner_products([g], [(0, 0)], fast=True)
            return torch.zeros_like(own), own + rest
        strange = self.norm2.device.type == "cpu" and not 1e-30 < float(self.norm2) < 1e38
        inner, own = inner_products([voting(self.total, self.voters), g], [(0, 1), (1, 1)], fast=True, wide=strange)
        return inner, own + rest

    def _absorb(self, row: list[Tensor | None], joins: Tensor, shrink: Tensor) -> None:
        """s <- s + g where the row joins; on an accelerator without asking the host whether it does."""
        if joins.device.type != "cpu":
            row = [None if g is None else g.masked_fill_(~joins.to(g.device), 0) for g in row]
        elif not joins:
            return
        pairs = [(s, g) for s, g in zip(self.total, row, strict=True) if s is not None and g is not None]
        if pairs:
            torch._foreach_add_([s for s, _ in pairs], [g for _, g in pairs])
        self.total = [in_range_of_sums(g) if s is None else s for s, g in zip(self.total, row, strict=True)]
        if self.policy.average == "halving":
            scale_(self.total, torch.where(joins, shrink, 1.0))

    def decide(self) -> tuple[Decision, Evidence]:
        decision = self.policy.conclude(torch.stack(self.accepted), torch.stack(self.distances))
        return decision, Evidence(torch.stack(self.norms2), torch.stack(self.signals).nanmean())

    def update(self, weights: list[float]) -> list[Tensor | None]:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [holds for holds, weight in zip(self.holds, weights, strict=True) if weight]
        total = [s if any(column) else None for s, column in zip(self.total, zip(*used, strict=True), strict=True)]
        if self.policy.average == "mean":
            scale_(total, max(weights))
        return total


def in_range_of_sums(grad: Tensor | None) -> Tensor | None:
    """float16 sums are held in float32: they leave float16's range where their mean does not."""
    return grad.float() if grad is not None and grad.dtype == torch.float16 else grad


def scale_(tensors: Sequence[Tensor | None], factor: Tensor | float) -> None:
    held = [t for t in tensors if t is not None]
    if isinstance(factor, Tensor) and factor.device.type == "cpu":
        factor = float(factor)
    if held and not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(held, factor)


class Stacked:
    """All k rows, for policies that need them apart."""

    def __init__(self, policy: Policy, voters: Sequence[bool]) -> None:
        self.policy, self.voters = policy, voters
        self.rows: list[list[Tensor | None]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: list[Tensor | None]) -> list[Tensor | None]:
        self.rows.append(row)
        return [None] * len(row)

    def decide(self) -> tuple[Decision, Evidence]:
        gram = gram_of([voting(row, self.voters) for row in self.rows])
        for own, row in zip(gram.diagonal(), self.rows, strict=True):
            own += norm2_of_rest(row, self.voters)
        return self.policy(gram), Evidence(gram.diagonal(), mean_off_diagonal(gram))

    def update(self, weights: list[float]) -> list[Tensor | None]:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [(row, w) for row, w in zip(self.rows, weights, strict=True) if w]
        return [weighted([(row[j], w) for row, w in used]) for j in range(len(self.voters))]


def weighted(terms: list[tuple[Tensor | None, float]]) -> Tensor | None:
    """The weighted sum of one parameter's gradients, added in float32 or wider."""
    total, dtype = None, None
    for grad, weight in terms:
        if grad is not None:
            dtype = grad.dtype
            term = grad.to(torch.promote_types(dtype, torch.float32)) * weight
            total = term if total is None else total.add_(term)
    return None if total is None else total.to(dtype)


def mean_off_diagonal(gram: Float64[Tensor, "k k"]) -> Float64[Tensor, ""]:
    """Over pairs of present rows, an estimate of |g|^2; NaN where there is no pair."""
    sound = present(gram.diagonal())
    pairs = (sound & sound[:, None]).triu(1)
    return torch.where(pairs, gram, 0.0).sum() / pairs.sum()
