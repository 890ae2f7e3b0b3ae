"""Per-sample gradients of one parameter, kept as factors.

Each kind gives two ways to the Gram matrix, and what they cost: `ghost`, and some `rows` of the
parameter at a time. Neither holds much more than `MOST` numbers at a time beside the factors.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gaf.rules.blas import full_precision, matrix_product
from gaf.rules.slices import has_float64
from gaf.shapes import Float, Float64, Int

MOST = 2**22  # numbers held at a time


class Dense:
    """The gradients themselves (n, size): of biases, and of scales and shifts."""

    def __init__(self, all_rows: Float[Tensor, "n size"]) -> None:
        self.all_rows = all_rows
        (self.n, self.height), self.width, self.groups = all_rows.shape, 1, 1

    def join(self, other: "Dense") -> "Dense":
        return Dense(self.all_rows + other.all_rows)

    @property
    def costs(self) -> tuple[float, float]:
        return math.inf, 0.0

    def rows(self, low: int, high: int) -> Float[Tensor, "n c"]:
        return self.all_rows[:, low:high]

    def ghost(self) -> Float64[Tensor, "n n"]:
        return matrix_product(self.all_rows)


class Outer:
    """Sums of outer products over positions: of the weights of linear layers and convolutions.

    Args:
        left: (n, G, T, P), what the rows of the parameter are multiplied by, in G groups of P.
        x: (n, ...), what `right` makes the other factor of.
        right: from m samples of x to (m, G, T, Q); None if x is that itself.
    """

    def __init__(
        self, left: Float[Tensor, "n G T P"], x: Tensor, right: "Right | None" = None
    ) -> None:
        self.left, self.sources = left, [(x, right)]
        self.n, self.groups, _, P = left.shape
        self.height = self.groups * P
        self.width = self.right(0, 1).shape[3]

    def right(self, start: int, stop: int) -> Float[Tensor, "m G T Q"]:
        """The other factor, of samples start to stop."""
        found = [x[start:stop] if make is None else make(x[start:stop]) for x, make in self.sources]
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def join(self, other: "Outer") -> "Outer":
        """Another use of the parameter is like further positions."""
        both = Outer(torch.cat([self.left, other.left], 2), *self.sources[0])
        both.sources = self.sources + other.sources
        return both

    @property
    def costs(self) -> tuple[float, float]:
        """Multiplications of the ghost way, and of the other."""
        n, G, T, P = self.left.shape
        return n * n * T * T * G * (P + self.width), n * G * P * self.width * (T + n)

    def rows(self, low: int, high: int) -> Float[Tensor, "n c"]:
        n, G, T, P = self.left.shape
        first, last = low // P, -(-high // P)  # groups
        left, low, high = self.left[:, first:last], low - first * P, high - first * P
        if last - first == 1:
            left, low, high = left[..., low:high], 0, high - low
        found = [
            left[i:j].mT @ self.right(i, j)[:, first:last] for i, j in ranges(n, G * T * self.width)
        ]
        rows = found[0] if len(found) == 1 else torch.cat(found)
        return rows.flatten(1, 2)[:, low:high].flatten(1)

    def ghost(self) -> Float64[Tensor, "n n"]:
        right = self.right(0, self.n)
        total = torch.zeros((), dtype=torch.float64, device=right.device)
        for ours, theirs in zip(self.left.unbind(1), right.unbind(1), strict=True):
            factors = exact(ours.flatten(0, 1)), exact(theirs.flatten(0, 1))
            product = partial(position_products, *factors)
            total = total + gram_by_positions(self.n, ours.shape[1], product)
        return total


Right = Callable[[Tensor], Tensor]


class Tokens:
    """Gradients of an embedding: to row ids[i, t] of the parameter, right[i, t] is added.

    Args:
        ids: (n, T) in [0, size).
        right: (n, T, Q).
        size: rows of the parameter.
    """

    def __init__(self, ids: Int[Tensor, "n T"], right: Float[Tensor, "n T Q"], size: int) -> None:
        self.ids, self.right = ids, right
        self.n, self.height, self.width, self.groups = len(ids), size, right.shape[2], 1

    def join(self, other: "Tokens") -> "Tokens":
        ids, right = torch.cat([self.ids, other.ids], 1), torch.cat([self.right, other.right], 1)
        return Tokens(ids, right, self.height)

    @property
    def costs(self) -> tuple[float, float]:
        n, T = self.ids.shape
        return n * n * T * T * self.width, n * self.width * (T + n * self.height)

    def rows(self, low: int, high: int) -> Float[Tensor, "n c"]:
        slots = high - low + 1  # the last is for all other rows of the parameter
        inside = (self.ids >= low) & (self.ids < high)
        slot = torch.where(inside, self.ids - low, high - low)
        slot = slot + slots * torch.arange(self.n, device=slot.device)[:, None]
        found = self.right.new_zeros(self.n * slots, self.width)
        found.index_add_(0, slot.flatten(), self.right.flatten(0, 1))
        return found.view(self.n, slots, self.width)[:, :-1].flatten(1)

    def ghost(self) -> Float64[Tensor, "n n"]:
        right, ids = exact(self.right.flatten(0, 1)), self.ids.flatten()

        def equal(start: int, stop: int) -> Tensor:
            same = ids[start:stop, None] == ids[start:]
            return torch.where(same, right[start:stop] @ right[start:].T, 0)

        return gram_by_positions(self.n, self.ids.shape[1], equal)


Piece = Dense | Outer | Tokens


def position_products(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """<left_t, left_s> <right_t, right_s> of positions t from start to stop and s from start."""
    return (left[start:stop] @ left[start:].T).mul_(right[start:stop] @ right[start:].T)


def gram_by_positions(
    n: int, T: int, product: Callable[[int, int], Tensor]
) -> Float64[Tensor, "n n"]:
    """K as sums over all pairs of two samples' positions.

    product: from (start, stop) to the products of positions start to stop with all from start on.
    """
    bands = []
    for i, j in ranges(n, n * T * T):
        band = product(i * T, j * T).view(j - i, T, n - i, T)
        bands.append((i, j, band.sum((1, 3), dtype=torch.float64)))
    K = bands[0][2].new_zeros(n, n)
    for i, j, band in bands:
        K[i:j, i:] = band
        K[i:, i:j] = band.T
    return K


def ranges(n: int, each: int) -> list[tuple[int, int]]:
    """Ranges of 0 to n, with at most `MOST` numbers in each if there are `each` in one of the n."""
    step = max(1, MOST // each)
    return [(i, min(i + step, n)) for i in range(0, n, step)]


def exact(factor: Tensor) -> Tensor:
    """In a precision in which torch's matrix products are good to float32's digits."""
    on_cpu = factor.device.type == "cpu"
    double = not full_precision() if on_cpu else has_float64(factor.device)
    return factor.double() if double else factor
