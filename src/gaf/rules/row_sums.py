"""K's diagonal and its row sums: 2 k numbers, which a plain all-reduce of the rows' sum gives too.

For many questions K itself is not needed. With S the sum of all k rows, each rank can measure its
own |g_i|^2 and <g_i, S>. From these 2 k scalars follow |S|^2, what the rows have in common, and how
far each row agrees with the sum of the others.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gaf.rules.gram import is_present
from gaf.shapes import Float64


@dataclass(frozen=True, eq=False)
class RowSums:
    """What is known of k rows and their sum S.

    If one row is not finite, neither is S: then all of `inner` is NaN, and so are the cosines.

    Attributes:
        norms2: (k,) float64, |g_i|^2.
        inner: (k,) float64, <g_i, S>.
    """

    norms2: Float64[Tensor, " k"]
    inner: Float64[Tensor, " k"]

    @classmethod
    def of_gram(cls, gram: Float64[Tensor, "k k"]) -> "RowSums":
        """From K."""
        return cls(gram.diagonal(), gram.sum(1))

    @property
    def total2(self) -> Float64[Tensor, ""]:
        """|S|^2."""
        return self.inner.sum()

    @property
    def signal(self) -> Float64[Tensor, ""]:
        """K's mean entry over pairs of rows that are not zero, an unbiased estimate of |g|^2.

        NaN without such a pair.
        """
        present = is_present(self.norms2).sum()
        pairs = present * (present - 1)
        return torch.where(pairs > 0, (self.total2 - self.norms2.sum()) / pairs, math.nan)

    @cached_property
    def cosines(self) -> Float64[Tensor, " k"]:
        """(k,) float64 in [-1, 1]: each row's cosine to the sum of the others.

            (<g_i, S> - |g_i|^2) / (|g_i| sqrt(|S|^2 - 2 <g_i, S> + |g_i|^2))

        NaN for an absent row, for all of them if S is not finite, and where the others cancel.
        """
        others2 = self.total2 - 2 * self.inner + self.norms2
        known = is_present(self.norms2) & is_present(others2)
        cosines = (self.inner - self.norms2) / (self.norms2.sqrt() * others2.sqrt())
        return torch.where(known, cosines.clamp(-1, 1), math.nan)


@dataclass(frozen=True, eq=False)
class NormSums(RowSums):
    """Sums of rows of which only the norms are known, and that of their sum.

    Attributes:
        inner: NaN.
        known_total2: () float64, |S|^2.
    """

    known_total2: Float64[Tensor, ""]

    @property
    def total2(self) -> Float64[Tensor, ""]:
        return self.known_total2
