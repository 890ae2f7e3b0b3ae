"""The way of sums: DDP's own average, and beside it each rank's |g|^2 and <g, S>.

S is the sum of all rows. From these 2 k numbers follow the rows' cosines to the sum of the others,
|S|^2 and the noise scale (`gaf.rules.row_sums`), which is what many questions need of K.

    method          collective     coordinates    afterwards
    send            all-reduce     2 n (W-1)/W    every rank holds S / W, as under plain DDP
    local_products  (none)         0              rank r has |g_r|^2, and if asked <g_r, S>
    (the Decider)   all ranks add  2 k scalars    every rank takes the same decision
    give_back       (none)         0              S / W was the update already
                    all-reduce     2 n (W-1)/W    only if rows are left out: the others, added up
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.ranks.exchange import Exchange, Parcel
from gaf.ranks.sent_piece import Pieces, SentPiece, divide
from gaf.rules.blas import in_range, products_by_blas
from gaf.rules.contract import Merge
from gaf.rules.gram import gram_of
from gaf.rules.row_sums import RowSums
from gaf.rules.slices import CHUNK, flatten, half_to_float32, split
from gaf.shapes import Float64

CACHED = 2**17  # coordinates that stay in a CPU's cache from one look to the next
LONG = 2**20  # coordinates from which errors of chunks cancel enough for larger ones


class Sums(Exchange):
    """An all-reduce of the average during the backward pass, and one pass over it after it.

    On a CPU |g|^2 is found while g is divided, in the same pass over memory. The later pass is for
    <g, S>, and without `multiplies` there is none: then |g|^2 travels while S does.

    This rank's own values are needed for the products, and where rows are left out. They are looked
    for where the engine keeps them (p.grad under DDP), and copied if it does not.

    Attributes:
        multiplies: whether <g, S> is found in this step; else it is NaN.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        super().__init__(group)
        self.multiplies = True
        # this rank's own values, and the average in the same coordinates
        self.kept: list[Pieces] = []
        self.norms2: list[float | None] = []  # of each piece; None: not known yet

    @property
    def factor(self) -> float:
        """What rows are multiplied by before they are added up: 1 over the ranks with data."""
        return 1 / self.active

    def begin(self) -> None:
        super().begin()
        self.kept, self.norms2 = [], []

    def send(self, flat: Tensor, piece: SentPiece | None = None) -> None:
        piece = piece or SentPiece(flat)
        own, places = piece.find_kept()
        slices = flat.new_empty(0)
        if not own:
            slices = self._spare.take_like(flat).copy_(flat)
            own, places = [slices], [flat]
        self.norms2.append(self._divide(piece))
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        self.parcels.append(Parcel(flat, slices, slices, [work]))
        self.kept.append((own, places))
        self.device = flat.device

    def _divide(self, piece: SentPiece) -> float | None:
        """By the ranks with data; |g|^2 if that shows it."""
        if self.factor == 1:
            return None
        if piece.flat.device.type != "cpu" or not piece.is_row:
            piece.divide(self.active)
            return None
        norm2 = sum(norm2_and_divide(*part, self.active) for part in piece.parts())
        return norm2 if in_range([norm2]) else None

    def receive(self) -> None:
        """Nothing yet: each piece is waited for when it is multiplied, while others arrive."""

    def local_products(self) -> Float64[Tensor, "k 2"]:
        """In this rank's row: |g|^2 and <g, S>."""
        known = torch.zeros(self.k, 2, dtype=torch.float64, device=self.device)
        mine = known[dist.get_rank(self.group)]
        for parcel, kept, norm2 in zip(self.parcels, self.kept, self.norms2, strict=True):
            if self.multiplies:
                parcel.wait()
                mine += products_with_sum(*kept, norm2)
            else:
                mine[0] += norm2_of(kept[0]) if norm2 is None else norm2
        mine[1] = mine[1] / self.factor if self.multiplies else math.nan
        return known

    def seen_in(self, total: Float64[Tensor, "k 2"]) -> RowSums | Tensor:
        return RowSums(total[:, 0], total[:, 1])

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        """The average with these weights, in the places of the plain one, which it mostly is."""
        self._wait()
        if len(set(weights)) > 1:
            self._add_weighted(weights)
        elif weights[0] != 1 / self.k:
            for parcel in self.parcels:
                parcel.whole.mul_(weights[0] * self.k)

    def fill(self, value: float) -> None:
        self._wait()
        super().fill(value)

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


def norm2_and_divide(part: Tensor, divides: bool, ranks: int) -> float:
    """|g|^2, and g is divided: both in one pass over memory."""
    norm2 = 0.0
    for chunk in part.view(-1).split(CACHED):
        values = half_to_float32(chunk)
        norm2 += values.dot(values).item()
        divide(chunk, ranks, divides)
    return norm2


def norm2_of(own: Sequence[Tensor]) -> Float64[Tensor, ""]:
    """|g|^2 of one piece."""
    return gram_of([own])[0, 0].to(own[0].device)


def products_with_sum(
    own: Sequence[Tensor], total: Sequence[Tensor], norm2: float | None
) -> Float64[Tensor, " 2"]:
    """|g|^2 and <g, S> of one piece, a tensor per parameter each; norm2: |g|^2 if known."""
    if own[0].device.type != "cpu":
        return gram_of([own, total])[0].to(own[0].device)
    if norm2 is not None:
        inner = inner_product(own, total)
        if 1e-30 < abs(inner) < 1e38:
            return torch.tensor([norm2, inner], dtype=torch.float64)
    found = [products_by_blas(s, g, CHUNK) for s, g in zip(total, own, strict=True)]
    norm2, inner = sum(norm2 for _, norm2 in found), sum(inner for inner, _ in found)
    return torch.tensor([norm2, inner], dtype=torch.float64)


def inner_product(own: Sequence[Tensor], total: Sequence[Tensor]) -> float:
    """<g, S> of one piece, by dot products in float32."""
    inner = 0.0
    for g, s in zip(own, total, strict=True):
        chunk = 4 * CHUNK if g.numel() >= LONG else CHUNK
        for a, b in split([half_to_float32(v) for v in flatten([g, s])], chunk):
            inner += a.dot(b).item()
    return inner
