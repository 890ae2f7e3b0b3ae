"""The way of sums: DDP's own average, and beside it each rank's |g|^2 and <g, S>.

S is the sum of all rows. From these 2 k numbers follow the rows' cosines to the sum of the others,
|S|^2 and the noise scale (`gaf.rules.row_sums`), which is what many questions need of K.

    method          collective     coordinates    afterwards
    send            all-reduce     2 n (W-1)/W    every rank holds S / W, as under plain DDP
    local_products  (none)         0              rank r has |g_r|^2 and <g_r, S>
    (the Decider)   all ranks add  2 k scalars    every rank takes the same decision
    give_back       (none)         0              S / W was the update already
                    all-reduce     2 n (W-1)/W    only if rows are left out: the others, added up
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.ranks.exchange import Exchange, Parcel, Pieces, SentPiece
from gaf.rules.blas import products_by_blas
from gaf.rules.contract import Merge
from gaf.rules.gram import gram_of
from gaf.rules.row_sums import RowSums
from gaf.rules.slices import CHUNK
from gaf.shapes import Float64


class Sums(Exchange):
    """An all-reduce of the average during the backward pass, and one pass over it after it.

    This rank's own values are needed for the products, and where rows are left out. They are looked
    for where the engine keeps them (p.grad under DDP), and copied if it does not.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        super().__init__(group)
        # this rank's own values, and the average in the same coordinates
        self.kept: list[Pieces] = []

    @property
    def factor(self) -> float:
        """What rows are multiplied by before they are added up: 1 over the ranks with data."""
        return 1 / self.active

    def begin(self) -> None:
        super().begin()
        self.kept = []

    def send(self, flat: Tensor, piece: SentPiece | None = None) -> None:
        piece = piece or SentPiece(flat)
        own, places = piece.find_kept()
        slices = flat.new_empty(0)
        if not own:
            slices = self._spare.take_like(flat).copy_(flat)
            own, places = [slices], [flat]
        if self.factor != 1:
            piece.divide(self.active)
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        self.parcels.append(Parcel(flat, slices, slices, [work]))
        self.kept.append((own, places))
        self.device = flat.device

    def receive(self) -> None:
        """Nothing yet: each piece is waited for when it is multiplied, while others arrive."""

    def local_products(self) -> Float64[Tensor, "k 2"]:
        """In this rank's row: |g|^2 and <g, S>."""
        known = torch.zeros(self.k, 2, dtype=torch.float64, device=self.device)
        mine = known[dist.get_rank(self.group)]
        for parcel, (own, places) in zip(self.parcels, self.kept, strict=True):
            for work in parcel.works:
                work.wait()
            mine += products_with_sum(own, places)
        mine[1] /= self.factor
        return known

    def seen_in(self, total: Float64[Tensor, "k 2"]) -> RowSums | Tensor:
        return RowSums(total[:, 0], total[:, 1])

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        """The average with these weights, in the places of the plain one, which it mostly is."""
        if len(set(weights)) > 1:
            self._add_weighted(weights)
        elif weights[0] != 1 / self.k:
            for parcel in self.parcels:
                parcel.whole.mul_(weights[0] * self.k)

    def _add_weighted(self, weights: Sequence[float]) -> None:
        """Adds up the rows anew. A row of weight zero is not multiplied: 0 x NaN is NaN."""
        used = sum(weight != 0 for weight in weights)
        # rows of ranks without data are zeros, and count only where DDP divides by all ranks
        weight = weights[dist.get_rank(self.group)] * used / (used - self.k + self.active)
        for parcel, (own, places) in zip(self.parcels, self.kept, strict=True):
            parcel.whole.zero_()
            if weight:
                for values, place in zip(own, places, strict=True):
                    torch.mul(values, weight, out=place)
            parcel.works = [dist.all_reduce(parcel.whole, group=self.group, async_op=True)]
        self._wait()


def products_with_sum(own: Sequence[Tensor], total: Sequence[Tensor]) -> Float64[Tensor, " 2"]:
    """|g|^2 and <g, S> of one piece, each given as a tensor per parameter."""
    if own[0].device.type != "cpu":
        return gram_of([own, total])[0].to(own[0].device)
    found = [products_by_blas(s, g, CHUNK) for s, g in zip(total, own, strict=True)]
    norm2, inner = sum(norm2 for _, norm2 in found), sum(inner for inner, _ in found)
    return torch.tensor([norm2, inner], dtype=torch.float64)
