"""When a batch is large enough: `Agreement`, by how far its micro-gradients agree."""

import copy
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NamedTuple

from gaf.arguments import ABOVE_0, is_number, one_of, plain_number, real_number, whole_number
from gaf.rules.contract import describe_state

LAST_STEPS = 100  # that the statistics cover


class PairMeans(NamedTuple):
    """K in two numbers: its mean off the diagonal, which estimates |g|^2, and on it."""

    between: float
    own: float


@dataclass(eq=False)
class Agreement:
    """How many micro-gradients a step averages: as many as it takes until their mean is signal.

        acc = gaf.Accumulator(optimizer, gaf.Mean(), until=gaf.Agreement(rho=0.7, at_most=64))
        for x, y in micro_batches:
            acc.backward(loss_fn(model(x), y))
            if acc.enough:
                acc.step()

    Nothing is dropped. With r = mean off-diagonal / mean diagonal of K, the mean of c
    micro-gradients has the share

        c r / (1 + (c - 1) r)

    of its squared length from the true gradient; this is also its squared cosine to it. c is the
    smallest number of at least 2 for which the share reaches rho, or at_most. r is the ratio of
    running means over the steps before, so that c is chosen without a look at the rows that it
    averages. Only the first step has none, and takes r from its own rows so far.

    K itself is not needed: with s the sum of c rows, the mean off the diagonal is
    (|s|^2 - sum |g_i|^2) / (c (c - 1)). An absent row (zero, NaN or infinite) counts in c alone.

    Args:
        rho: the share to reach, above 0 and below 1. Higher takes more micro-gradients a step.
        at_most: micro-gradients of a step, at least 2.
        rate: "constant" leaves the learning rate alone. "linear" multiplies it by c for the step,
            "sqrt" by sqrt(c), in every group, and puts it back after it: it is then the rate of a
            step on one micro-batch.
        window: steps that the running means look back, at least 1. Higher is steadier and slower.

    Raises:
        ValueError: if an argument is out of its range.

    >>> Agreement(0.5, 64).share(8, 0.125)
    0.5333333333333333
    """

    rho: float
    at_most: int
    _: KW_ONLY
    rate: Literal["constant", "linear", "sqrt"] = "constant"
    window: float = 20.0
    _means: PairMeans = field(default=PairMeans(0.0, 0.0), init=False, repr=False)
    _sizes: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_number(self.rho) or not 0 < self.rho < 1:
            raise ValueError(
                f"Agreement: rho must be above 0 and below 1; got {self.rho!r}. "
                "0.5 asks for as much signal as noise."
            )
        self.rho = plain_number(self.rho)
        least = "A step of one micro-gradient shows no agreement."
        self.at_most = whole_number("Agreement: at_most", self.at_most, 2, least)
        one_of("Agreement: rate", self.rate, ("constant", "linear", "sqrt"))
        default = "Leave it out for the default."
        self.window = real_number("Agreement: window", self.window, 1, math.inf, default)

    @property
    def r(self) -> float:
        """Mean off-diagonal over mean diagonal of K, of the steps so far; NaN before the first."""
        return ratio_of(self._means)

    def share(self, c: int, r: float) -> float:
        """The share in [0, 1] of the squared length of c rows' mean that is signal."""
        return 0.0 if r <= 0 else c * r / (1 + (c - 1) * r)

    def suffices(self, c: int, measure: Callable[[], PairMeans]) -> bool:
        """Whether a step on c rows is due.

        Args:
            c: rows so far.
            measure: of these rows; called only where no step came before.
        """
        if c < 2 or c >= self.at_most:
            return c >= self.at_most
        r = self.r if self._means.own else ratio_of(measure())
        return self.share(c, r) >= self.rho

    def factor(self, c: int) -> float:
        """What the learning rate of a step on c rows is multiplied by."""
        return {"constant": 1.0, "linear": float(c), "sqrt": math.sqrt(c)}[self.rate]

    def learn(self, c: int, means: PairMeans) -> None:
        """Takes in a step on c rows. Means that are not finite change no running mean."""
        self._sizes = [*self._sizes[1 - LAST_STEPS :], c]
        if all(map(math.isfinite, means)):
            kept = 1 - 1 / self.window
            sums = (kept * old + new for old, new in zip(self._means, means, strict=True))
            self._means = PairMeans(*sums)

    def stats(self) -> dict[str, float]:
        """See `gaf.Accumulator.stats`."""
        sizes, r = self._sizes, self.r
        return {
            "rows_mean": sum(sizes) / len(sizes) if sizes else math.nan,
            "agreement": r,
            "signal_share": self.share(sizes[-1], r) if sizes and r == r else math.nan,
        }

    def private_copy(self) -> "Agreement":
        """A copy that learns by itself."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """The running means, and the last steps' numbers of rows."""
        return {"means": list(self._means), "sizes": list(self._sizes)}

    def load_state_dict(self, state: Any) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for what is no such state.
        """
        sound = isinstance(state, dict) and state.keys() == {"means", "sizes"}
        if not sound or len(state["means"]) != 2:
            raise ValueError(
                "Agreement: the state must hold means and sizes; it holds "
                f"{describe_state(state)}. Load what state_dict() gave, whole."
            )
        self._means, self._sizes = PairMeans(*state["means"]), list(state["sizes"])


def ratio_of(means: PairMeans) -> float:
    """Mean off-diagonal over mean diagonal, at most 1; NaN if nothing was measured."""
    if not means.own >= ABOVE_0 or math.isnan(means.between):
        return math.nan
    return min(means.between / means.own, 1.0)
