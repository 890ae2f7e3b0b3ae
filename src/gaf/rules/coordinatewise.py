"""Rules that decide about each coordinate by itself: median, trimmed mean, sign agreement.

After the all-to-all a rank holds all k values of each of its coordinates, so these cost the bytes
of one all-reduce, as every policy does. All present rows are accepted.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from gaf.arguments import one_of, whole_number
from gaf.rules.asking import decide_by_weights
from gaf.rules.decision import Decision
from gaf.rules.gram import check_gram, is_present
from gaf.rules.order import ranked_rows
from gaf.shapes import Float, Float64

Scope = Literal["all", "group", "layer"]


@dataclass
class Coordinatewise:
    """A rule whose update is made coordinate by coordinate from all present rows.

    Derive from it and override `merge`; and `min_accepted`, if the rule needs several rows.

    Called on K it accepts every present row, each with the nominal weight 1 / r for r of them. It
    steps if at least `min_accepted` are present; a single row (k = 1) is enough by itself.
    """

    _: KW_ONLY
    scope: Scope = "all"

    def __post_init__(self) -> None:
        one_of(f"{type(self).__name__}: scope", self.scope, ("all", "group", "layer"))

    @property
    def min_accepted(self) -> int:
        """Present rows that a step needs."""
        return 1

    def merge(self, rows: Float[Tensor, "r c"], place: int) -> Float[Tensor, " c"]:
        """The update of a slice.

        Args:
            rows: (r, c), the present rows of a slice, float32 or float64; may be written over.
            place: where the slice's first coordinate stands in the engine's order.
        """
        raise NotImplementedError

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        """Decides which rows count: those that are present in the Gram matrix, (k, k) float64."""
        check_gram(gram)
        present = is_present(gram.diagonal())
        count, least = present.sum(), self.min_accepted if len(gram) > 1 else 1
        accepted = present & (count >= least)
        return decide_by_weights(accepted.double() / count.clamp_min(1), gram)


@dataclass
class Median(Coordinatewise):
    """The median of the present rows at each coordinate.

    Of an even number of values it is the mean of the two in the middle; torch.median takes the
    lower one.

    It bounds what fewer than half of the rows can do (Yin et al., arXiv 1803.01498). With three
    rows it is M3 (Zielinski et al., arXiv 2003.07422); with two it is their mean. Where all rows
    are sound it is noisier than their average: for many rows of Gaussian noise by pi / 2 in
    variance.

    Args:
        scope: what is present or absent as one, as for `gaf.GAF`: all of a row, or its part in a
            "group" or a "layer".

    >>> from gaf import aggregate
    >>> aggregate(torch.tensor([[1.0, 9.0], [2.0, -9.0], [90.0, 1.0]]), Median())[0]
    tensor([2., 1.])
    """

    def merge(self, rows: Float[Tensor, "r c"], place: int) -> Float[Tensor, " c"]:
        r = len(rows)
        low, high = ranked_rows(rows, [(r - 1) // 2, r // 2])
        return low if r % 2 else (low + high) / 2


@dataclass
class TrimmedMean(Coordinatewise):
    """At each coordinate, the mean without the `trim` largest and the `trim` smallest values.

    It bounds what `trim` rows can do (Yin et al., arXiv 1803.01498).

    Args:
        trim: values left out at each end, at least 0. Higher withstands more bad rows. A step needs
            2 trim + 1 present rows.
        scope: as for `gaf.Median`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    trim: int
    argument_of_least = "trim"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trim = whole_number("TrimmedMean: trim", self.trim, 0, "1 leaves out two values.")

    @property
    def min_accepted(self) -> int:
        return 2 * self.trim + 1

    def merge(self, rows: Float[Tensor, "r c"], place: int) -> Float[Tensor, " c"]:
        trim = min(self.trim, (len(rows) - 1) // 2)  # a single row is taken as it is
        if not trim:
            return rows.mean(0)
        first, *others = ranked_rows(rows, range(trim, len(rows) - trim))
        for row in others:
            first += row
        return first / (1 + len(others))


@dataclass
class SignAgreement(Coordinatewise):
    """The mean of all present rows, at the coordinates where enough of them have the same sign.

    The other coordinates are zero: the optimizer sees a gradient of zero there, so momentum and
    weight decay still move them. This is the AND-mask (Parascandolo et al., arXiv 2009.00329),
    with a number of rows in place of a share of them.

    Args:
        at_least: rows that must share a sign, at least 1; zeros have none. Higher moves fewer
            coordinates; k, only those where all agree. A step needs as many present rows.
        scope: as for `gaf.Median`.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from gaf import aggregate
    >>> aggregate(torch.tensor([[1.0, 9.0], [2.0, -9.0], [3.0, 3.0]]), SignAgreement(3))[0]
    tensor([2., 0.])
    """

    at_least: int
    argument_of_least = "at_least"

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "It counts rows: of four, 3 is a clear majority."
        self.at_least = whole_number("SignAgreement: at_least", self.at_least, 1, fix)

    @property
    def min_accepted(self) -> int:
        return self.at_least

    def merge(self, rows: Float[Tensor, "r c"], place: int) -> Float[Tensor, " c"]:
        enough = min(self.at_least, len(rows))  # a single row agrees with itself
        mean = rows.mean(0)
        # enough are negative if the largest of as many small values is; likewise positive
        small, large = ranked_rows(rows, [enough - 1, len(rows) - enough])
        agree = torch.maximum(-small, large).sign_().clamp_min_(0)  # 1 or 0: faster than a bool
        return mean * agree
