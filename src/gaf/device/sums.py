"""The running sum s of the accepted rows, and each row's products <s, g> and |g|^2 with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.device.buffers import Buffers, add_in_place, have_same_layout, norm2_of_rest, voting_part
from gaf.rules.blas import products_by_blas
from gaf.rules.gram import gram_of
from gaf.rules.slices import float64_device, half_to_float32
from gaf.shapes import Bool, Float64


class SumOnCpu:
    """s, and beside it the candidate s + g, made parameter by parameter while g is in the cache.

    An accepted row is in the candidate already; a rejected one leaves s bit for bit as it was.
    Autograd's own memory is free for the next layer at once. The two buffers swap places: memory
    freed and allocated anew at every micro-batch would cost page faults.

    Args:
        voters: which parameters take part in the decision.
        spare: buffers that may be written over.
    """

    device = torch.device("cpu")

    def __init__(self, voters: Sequence[bool], spare: Buffers) -> None:
        self.voters, self.spare = voters, spare
        self.total: Buffers = [None] * len(voters)
        self.candidate: Buffers = [None] * len(voters)
        self.inner = self.own = 0.0
        # only for Mean: the sum with absent rows included, from the first of them on
        self.all_rows: Buffers | None = None
        # the current row's gradients, from then on
        self.row: list[tuple[int, Tensor]] = []

    @property
    def update(self) -> Buffers:
        """The sum that becomes the update."""
        return self.total if self.all_rows is None else self.all_rows

    def take(self, j: int, grad: Tensor) -> None:
        """Adds parameter j's share to <s, g> and |g|^2, and makes its part of the candidate."""
        total = self.total[j]
        if self.voters[j]:
            inner, own = products_by_blas(total, grad)
            self.inner, self.own = self.inner + inner, self.own + own
        else:
            # NaN where it is not finite: the row counts as absent
            self.own += 0.0 * products_by_blas(None, grad)[1]
        self.candidate[j] = half_to_float32(grad) if total is None else self._with(total, grad, j)
        if self.all_rows is not None:
            self.row.append((j, grad))

    def _with(self, total: Tensor, grad: Tensor, j: int) -> Tensor:
        """s + g, in the spare buffer if it fits."""
        spare, self.spare[j] = self.spare[j], None
        if spare is not None and have_same_layout(spare, total):
            return torch.add(total, grad, out=spare)
        return torch.add(total, grad)

    def measure(self) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        """<s, g> and |g|^2 of the row."""
        found = torch.tensor([self.inner, self.own], dtype=torch.float64, device=self.device)
        self.inner = self.own = 0.0
        return found[0], found[1]

    def absorb(
        self, joins: Bool[Tensor, ""], shrink: Float64[Tensor, ""], counts: bool = False
    ) -> None:
        """s <- shrink (s + g) where the row joins; else s stays.

        Args:
            joins: whether the row is accepted.
            shrink: what halving multiplies the sum by.
            counts: whether the update includes absent rows too (only Mean), see `Sequential`.
        """
        if counts and not (joins and self.all_rows is None):
            self._count()
        if not joins:
            return self.drop()
        for j, candidate in enumerate(self.candidate):
            if candidate is not None:
                old, self.total[j] = self.total[j], candidate
                self.spare[j] = self.spare[j] if old is None else old
        self.candidate = [None] * len(self.voters)
        if shrink != 1:
            torch._foreach_mul_([t for t in self.total if t is not None], float(shrink))
        return None

    def _count(self) -> None:
        """Adds the row to the sum of all rows, which begins as the first absent row's candidate."""
        if self.all_rows is None:
            pairs = zip(self.total, self.candidate, strict=True)
            self.all_rows = [s.clone() if c is None and s is not None else c for s, c in pairs]
            self.candidate = [None] * len(self.voters)
        for j, grad in self.row:
            total = self.all_rows[j]
            new = half_to_float32(grad).clone() if total is None else total.add_(grad)
            self.all_rows[j] = new
        self.row = []

    def drop(self) -> None:
        """Drops the row. Its candidate becomes spare."""
        self.row = []
        pairs = zip(self.spare, self.candidate, strict=True)
        self.spare = [s if c is None else c for s, c in pairs]
        self.candidate = [None] * len(self.voters)
        self.inner = self.own = 0.0


class SumOnDevice:
    """s and the current row on an accelerator.

    A row is measured when it is complete, and added without waiting for the host.

    Args:
        voters: which parameters take part in the decision.
        halving: whether `shrink` is ever other than 1.
        device: of the parameters.
    """

    def __init__(self, voters: Sequence[bool], halving: bool, device: torch.device) -> None:
        self.voters, self.halving = voters, halving
        self.device = float64_device(device)
        # the device's own allocator keeps memory at hand
        self.spare: Buffers = [None] * len(voters)
        self.total: Buffers = [None] * len(voters)
        self.row: Buffers = [None] * len(voters)
        self.all_rows: Buffers | None = None  # their sum, where absent ones count too

    @property
    def update(self) -> Buffers:
        """The sum that becomes the update."""
        return self.total if self.all_rows is None else self.all_rows

    def take(self, j: int, grad: Tensor) -> None:
        self.row[j] = grad

    def measure(self) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        pair = [voting_part(self.total, self.voters), voting_part(self.row, self.voters)]
        gram = gram_of(pair).to(self.device)
        return gram[0, 1], gram[1, 1] + norm2_of_rest(self.row, self.voters)

    def absorb(
        self, joins: Bool[Tensor, ""], shrink: Float64[Tensor, ""], counts: bool = False
    ) -> None:
        if counts:
            whole = self.all_rows or [None] * len(self.row)
            pairs = zip(whole, self.row, strict=True)
            copies = [g.clone() if s is None and g is not None else g for s, g in pairs]
            self.all_rows = add_in_place(whole, copies)
        row = [None if g is None else g.masked_fill_(~joins.to(g.device), 0) for g in self.row]
        self.total = add_in_place(self.total, row)
        if self.halving:
            for total in self.total:
                if total is not None:
                    total.mul_(torch.where(joins, shrink, 1.0).to(total.device))
        self.drop()

    def drop(self) -> None:
        self.row = [None] * len(self.voters)
