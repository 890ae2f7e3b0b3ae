"""Two ranks' shorter way: an all-reduce of the sum, and K from a few inner products with it."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.ranks.exchange import Exchange, Parcel, Pieces, no_pieces
from gaf.rules.blas import products_by_blas
from gaf.rules.contract import Merge
from gaf.rules.gram import inner_products
from gaf.rules.slices import CHUNK
from gaf.shapes import Float64


class Pair(Exchange):
    """An all-reduce of the sum S, during the backward pass but for a few inner products.

        |g_0|^2, |g_1|^2        each from its rank
        <g_0, g_1>  =  <g, S> - |g|^2        g: the shorter of the two, whose rank has kept a copy

    The shorter one is used because nothing cancels there: (|S|^2 - |g_0|^2 - |g_1|^2) / 2 would
    lose a short row in the rounding of a long one. The outcome must be the mean of both or a skip,
    and S must keep its terms' digits: for policies that need two rows, and gradients of float32 or
    wider.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        super().__init__(group)
        # this rank's own values, and S in the same coordinates
        self.kept: list[Pieces] = []

    def begin(self) -> None:
        super().begin()
        self.kept = []

    def send(self, flat: Tensor, find_kept: Callable[[], Pieces] = no_pieces) -> None:
        own, places = find_kept()
        slices = flat.new_empty(0)
        if not own:
            slices = self._spare.take_like(flat).copy_(flat)
            own, places = [slices], [flat]
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        self.parcels.append(Parcel(flat, slices, slices, [work]))
        self.kept.append((own, places))
        self.device = flat.device

    def receive(self) -> None:
        self._wait()

    def local_products(self) -> Float64[Tensor, "k k"]:
        """In this rank's row: |g|^2 and <g, S>."""
        known = torch.zeros(2, 2, dtype=torch.float64, device=self.device)
        for own, places in self.kept:
            known[dist.get_rank(self.group)] += products_with_sum(own, places)
        return known

    def gram_from_products(self, total: Float64[Tensor, "k k"]) -> Float64[Tensor, "k k"]:
        (a, a_with_sum), (b, b_with_sum) = total
        between = a_with_sum - a if a <= b else b_with_sum - b
        return torch.stack([a, between, between, b]).view(2, 2)

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        for parcel in self.parcels:
            parcel.whole.mul_(weights[0])


def products_with_sum(own: Sequence[Tensor], total: Sequence[Tensor]) -> Float64[Tensor, " 2"]:
    """|g|^2 and <g, S> of one piece, each given as a tensor per parameter."""
    if own[0].device.type != "cpu":
        return inner_products([own, total], [(0, 0), (0, 1)]).to(own[0].device)
    found = [products_by_blas(s, g, CHUNK) for s, g in zip(total, own, strict=True)]
    norm2, inner = sum(norm2 for _, norm2 in found), sum(inner for inner, _ in found)
    return torch.tensor([norm2, inner], dtype=torch.float64)
