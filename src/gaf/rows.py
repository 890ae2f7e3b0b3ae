"""Holds the micro-gradients of one macro-batch until the decision: added up as they come, or kept apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.combine import Policy
from gaf.decision import Decision
from gaf.gram import Row, added, gram_of, in_range, inner_products, quick_products
from gaf.policies import Sequential, norm2_after, present
from gaf.shapes import Float64
from gaf.telemetry import Evidence

PAIR = [(0, 1), (1, 1)]  # of the rows (s, g): <s, g> and |g|^2
Buffers = list[Tensor | None]


def rows_for(policy: Policy, voters: Sequence[bool], spare: Buffers) -> "Streamed | Stacked":
    if isinstance(policy, Sequential) and policy.streams:
        return Streamed(policy, voters, spare)
    return Stacked(policy, voters, spare)


def norm2_of_rest(row: Row, voters: Sequence[bool]) -> Tensor | float:
    """0 x |the coordinates that do not vote|^2: NaN where one of them is not finite, so that the row counts as absent."""
    rest = [t for t, votes in zip(row, voters, strict=True) if not votes]
    return 0.0 * gram_of([rest])[0, 0] if rest else 0.0


def voting(row: Row, voters: Sequence[bool]) -> Row:
    return [t for t, votes in zip(row, voters, strict=True) if votes]


class Streamed:
    """The running sum and the current row: one gradient-sized buffer beyond plain accumulation, whatever k.

    On a CPU a gradient is measured as it arrives, while it is in the cache, and copied to a spare buffer, so that
    autograd's own memory is free for the next layer: memory given back and asked for anew at every micro-batch costs
    page faults. On an accelerator, whose allocator keeps memory at hand, all are measured at once at the end.

    Args:
        policy: gives the accept rule (`visit`) and the verdict (`conclude`).
        voters: which parameters the decision looks at.
        spare: buffers that may be written over, one per parameter.
    """

    def __init__(self, policy: Sequential, voters: Sequence[bool], spare: Buffers) -> None:
        self.policy, self.voters, self.spare = policy, voters, spare
        self.total: Buffers = [None] * len(voters)  # the running sum s
        self.holds: list[list[bool]] = []  # per row, the parameters that got a gradient
        self.measured: dict[int, list[list[Tensor]]] = {}  # by parameter, its shares of <s, g> and |g|^2
        self.count = torch.zeros((), dtype=torch.int64)
        self.norm2 = torch.zeros((), dtype=torch.float64)  # |s|^2
        self.accepted: list[Tensor] = []
        self.distances: list[Tensor] = []
        self.norms2: list[Tensor] = []
        self.signals: list[Tensor] = []  # <s, g_i> / c, an estimate of |g|^2 for each row but the start

    def __len__(self) -> int:
        return len(self.holds)

    def take(self, j: int, grad: Tensor) -> Tensor:
        """Takes parameter j's gradient during the backward pass. Returns it, or the buffer that it was copied to."""
        if grad.device.type != "cpu" or grad.layout != torch.strided:
            return grad
        if self.voters[j]:
            self.measured[j] = quick_products(self.total[j], grad)
        spare, self.spare[j] = self.spare[j], None
        return spare.copy_(grad) if spare is not None and alike(spare, grad) else grad

    def drop(self) -> None:
        """Forgets what was measured of a row whose backward pass failed."""
        self.measured = {}

    def add(self, row: Buffers) -> None:
        """Visits a row."""
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
        self.spare = [g if g is not None and g.device.type == "cpu" and id(g) not in held else None for g in row]

    def _measure(self, row: Buffers) -> tuple[Tensor, Tensor]:
        """<s, g> and |g|^2; |s|^2 follows from those before."""
        rows = [voting(self.total, self.voters), voting(row, self.voters)]
        measured, self.measured = self.measured, {}
        if measured and len(measured) == sum(g is not None for g in rows[1]):
            found = added([share for shares in measured.values() for share in shares])
            in_reach = not self.holds or 1e-30 < float(self.norm2) < 1e38
            if not (in_reach and in_range(found, PAIR)):  # out of float32's range: a rare second look
                found = inner_products(rows, PAIR, wide=True)
        else:
            found = inner_products(rows, PAIR)
        return found[0], found[1] + norm2_of_rest(row, self.voters)

    def _absorb(self, row: Buffers, joins: Tensor, shrink: Tensor) -> None:
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

    def update(self, weights: list[float]) -> Buffers:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [holds for holds, weight in zip(self.holds, weights, strict=True) if weight]
        total = [s if any(column) else None for s, column in zip(self.total, zip(*used, strict=True), strict=True)]
        if self.policy.average == "mean":
            scale_(total, max(weights))
        return total


def in_range_of_sums(grad: Tensor | None) -> Tensor | None:
    """float16 sums are held in float32: they leave float16's range where their mean does not."""
    return grad.float() if grad is not None and grad.dtype == torch.float16 else grad


def alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device


def scale_(tensors: Sequence[Tensor | None], factor: Tensor | float) -> None:
    held = [t for t in tensors if t is not None]
    if isinstance(factor, Tensor) and factor.device.type == "cpu":
        factor = float(factor)
    if held and not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(held, factor)


class Stacked:
    """All k rows, for policies that need them apart."""

    def __init__(self, policy: Policy, voters: Sequence[bool], spare: Buffers) -> None:
        self.policy, self.voters, self.spare = policy, voters, spare
        self.rows: list[Buffers] = []

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, j: int, grad: Tensor) -> Tensor:
        return grad

    def drop(self) -> None:
        pass

    def add(self, row: Buffers) -> None:
        self.rows.append(row)

    def decide(self) -> tuple[Decision, Evidence]:
        gram = gram_of([voting(row, self.voters) for row in self.rows])
        for own, row in zip(gram.diagonal(), self.rows, strict=True):
            own += norm2_of_rest(row, self.voters)
        return self.policy(gram), Evidence(gram.diagonal(), mean_off_diagonal(gram))

    def update(self, weights: list[float]) -> Buffers:
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
