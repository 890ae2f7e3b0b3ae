"""Two ranks' shorter way: an all-reduce of the sum, and K from a few inner products with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.ranks.sums import Sums
from gaf.rules.contract import Merge
from gaf.shapes import Float64


class Pair(Sums):
    """An all-reduce of the sum S, during the backward pass but for a few inner products.

        |g_0|^2, |g_1|^2        each from its rank
        <g_0, g_1>  =  <g, S> - |g|^2        g: the shorter of the two, whose rank has kept a copy

    The shorter one is used because nothing cancels there: (|S|^2 - |g_0|^2 - |g_1|^2) / 2 would
    lose a short row in the rounding of a long one. The outcome must be the mean of both or a skip,
    and S must keep its terms' digits: for policies that need two rows, and gradients of float32 or
    wider.
    """

    factor = 1.0

    def seen_in(self, total: Float64[Tensor, "k 2"]) -> Float64[Tensor, "k k"]:
        """K from |g|^2 and <g, S> of both."""
        (a, a_with_sum), (b, b_with_sum) = total
        between = a_with_sum - a if a <= b else b_with_sum - b
        return torch.stack([a, between, between, b]).view(2, 2)

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        for parcel in self.parcels:
            parcel.whole.mul_(weights[0])
