"""The running sum s of the accepted rows, and each row's products <s, g> and |g|^2 with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.device.buffers import (
    Buffers,
    add_in_place,
    is_missing,
    norm2_of_rest,
    unshare_all,
    voting_part,
    with_copies,
)
from gaf.rules.blas import products_by_blas
from gaf.rules.gram import products_of
from gaf.rules.slices import float64_device
from gaf.shapes import Bool, Float64


class SumOnCpu:
    """s, and the row that is added to it.

    Args:
        voters: which parameters take part in the decision.
        roots: sqrt(M) of a diagonal metric, for each parameter that takes part.
    """

    def __init__(self, voters: Sequence[bool], roots: Buffers | None = None) -> None:
        self.voters, self.roots = voters, roots or [None] * len(voters)
        self.total: Buffers = [None] * len(voters)
        # only for Mean: the sum with absent rows included, from the first of them on
        self.all_rows: Buffers | None = None

    @property
    def update(self) -> Buffers:
        """The sum that becomes the update."""
        return self.total if self.all_rows is None else self.all_rows

    def measure(self, row: Buffers) -> tuple[float, float]:
        """<s, g> and |g|^2 of the row."""
        inner = own = 0.0
        for s, g, votes, root in zip(self.total, row, self.voters, self.roots, strict=True):
            if g is None:
                continue
            if votes and root is not None:
                share = products_by_blas(None if s is None else s * root, g * root)
                inner, own = inner + share[0], own + share[1]
            elif votes:
                share = products_by_blas(s, g)
                inner, own = inner + share[0], own + share[1]
            else:
                own += 0.0 * products_by_blas(None, g)[1]  # NaN for a NaN: the row counts as absent
        return inner, own

    def absorb(self, row: Buffers, joins: bool, shrink: float, counts: bool = False) -> None:
        """s <- shrink (s + g) where the row joins; else s stays bit for bit.

        Args:
            row: is used up.
            joins: whether the row is accepted.
            shrink: what halving multiplies the sum by.
            counts: whether the update includes absent rows too (only Mean), see `Sequential`.
        """
        if counts and (self.all_rows is not None or not joins):
            nothing: Buffers = [None] * len(row)
            self.all_rows = self.all_rows or with_copies(self.total, nothing)
            add_in_place(self.all_rows, with_copies(row, self.all_rows))
        if joins:
            add_in_place(self.total, row)
            if shrink != 1:
                torch._foreach_mul_([t for t in self.total if t is not None], float(shrink))


class SumOnDevice:
    """s on an accelerator. A row is added without waiting for the host.

    Args:
        voters: which vectors of a row take part in the decision.
        halving: whether `shrink` is ever other than 1.
        device: of the parameters.
        roots: as for `SumOnCpu`.
    """

    def __init__(
        self,
        voters: Sequence[bool],
        halving: bool,
        device: torch.device,
        roots: Buffers | None = None,
    ) -> None:
        self.voters, self.halving = voters, halving
        self.roots = None if roots is None else voting_part(roots, voters)
        self.device = float64_device(device)
        self.total: Buffers = [None] * len(voters)
        self.all_rows: Buffers | None = None  # their sum, where absent ones count too

    @property
    def update(self) -> Buffers:
        """The sum that becomes the update."""
        return self.total if self.all_rows is None else self.all_rows

    def measure(self, row: Buffers) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        pair = [voting_part(self.total, self.voters), voting_part(row, self.voters)]
        if is_missing(pair[1]):  # moving products of nothing to the device would wait for it
            inner = own = torch.zeros((), dtype=torch.float64, device=self.device)
        else:
            inner, own = products_of(pair[0], pair[1], self.roots)
        return inner.to(self.device), own.to(self.device) + norm2_of_rest(row, self.voters)

    def absorb(
        self,
        row: Buffers,
        joins: Bool[Tensor, ""],
        shrink: Float64[Tensor, ""],
        counts: bool = False,
    ) -> None:
        if counts:
            self.all_rows = self.all_rows or [None] * len(row)
            add_in_place(self.all_rows, with_copies(row, self.all_rows))
        unshare_all(row)
        clear_unless(joins, row)
        add_in_place(self.total, row)
        if self.halving:
            for total in self.total:
                if total is not None:
                    total.mul_(torch.where(joins, shrink, 1.0).to(total.device))


def clear_unless(joins: Bool[Tensor, ""], row: Buffers) -> None:
    """Fills the row with zeros if it does not join."""
    stays_out = ~joins
    for g in row:
        if g is not None:
            g.masked_fill_(stays_out.to(g.device), 0)
