"""The rule behind the policies: rows are visited one by one, each against a running sum.

The sum is that of the rows accepted before. `visit` needs three numbers of a row: its inner product
with the sum, and both norms. They are read off the Gram matrix (`walk`), or measured while the rows
stream by (`gaf.rules.visits`). The rule is the same.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gaf.rules.decision import Decision
from gaf.rules.gram import check_gram, is_present
from gaf.shapes import Bool, Float64, Int

# a distance equal to tau is accepted; rounding in float64 must not turn such a tie into a rejection
TIE = 1e-12


def visit(
    count: Int[Tensor, "*s"],
    inner: Float64[Tensor, "*s"],
    norm2: Float64[Tensor, "*s"],
    own: Float64[Tensor, "*s"],
    tau: float | Tensor,
) -> tuple[Bool[Tensor, "*s"], Float64[Tensor, "*s"]]:
    """The accept rule: one row g against the running sum s of `count` rows (paper, algorithm 1).

        distance = 1 - <s, g> / (|s| |g|), in [0, 2]        accepted: distance <= tau

    The first present row starts the sum: distance 0. An absent row (norm zero or not finite) is
    never accepted: distance NaN. Rows that cancelled have left a sum without direction: distance 1.

    Args:
        count: rows in the sum.
        inner: <s, g>.
        norm2: |s|^2.
        own: |g|^2.
        tau: the largest distance that is accepted; a higher one accepts more.

    Returns:
        accepted, distance.
    """
    cosine = torch.where(norm2 > 0, inner / (norm2.sqrt() * own.sqrt()), 0.0)
    distance = torch.where(count > 0, (1 - cosine).clamp(0, 2), 0.0)
    distance = torch.where(is_present(own), distance, math.nan)
    return distance <= tau + TIE, distance


@dataclass(frozen=True, eq=False)
class Seen:
    """What a policy that learns is shown of a macro-batch.

    It is the same from a Gram matrix and from rows that streamed by.

    Attributes:
        accepted: (k,) bool, rows that the rule accepted, even if too few did for a step.
        distances: (k,) float64, as in a Decision.
        norms2: (k,) float64, squared norms.
        signals: (k,) float64, <s, g_i> / c of each row that was compared; NaN for the others.
        gram: (k, k) float64; None if the rows streamed by.
    """

    accepted: Bool[Tensor, " k"]
    distances: Float64[Tensor, " k"]
    norms2: Float64[Tensor, " k"]
    signals: Float64[Tensor, " k"]
    gram: Float64[Tensor, "k k"] | None


class Sequential:
    """A policy that visits the rows in order, each against the sum of those accepted before it."""

    average: Literal["mean", "halving"] = "mean"
    # the rows may be added up as they come: no later decision needs them apart
    streams = True
    # whether an absent row is in the update all the same, so that its NaN goes through;
    # other rows are not compared with it
    adds_absent = False

    def visit(
        self,
        count: Int[Tensor, "*s"],
        inner: Float64[Tensor, "*s"],
        norm2: Float64[Tensor, "*s"],
        own: Float64[Tensor, "*s"],
    ) -> tuple[Bool[Tensor, "*s"], Float64[Tensor, "*s"]]:
        """Whether a row joins the running sum, and its distance; see `visit` of this module."""
        return visit(count, inner, norm2, own, self.tau_at(inner.device))

    def tau_at(self, device: torch.device) -> float | Tensor:
        """The largest distance that `visit` accepts; a tensor is on the device."""
        raise NotImplementedError

    def shrink(self, count: Int[Tensor, "*s"]) -> Float64[Tensor, "*s"]:
        """The factor of the sum once a row has joined `count` others: 1, or 1/2 for "halving"."""
        halved = (count > 0) & (self.average == "halving")
        return 1.0 - 0.5 * halved.double()

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        """The decision, once every row was visited."""
        raise NotImplementedError

    def learn(self, seen: Seen) -> None:
        """Called after each decision; a policy that adapts changes here, for the next one."""

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        """Decides from the Gram matrix, (k, k) float64.

        A diagonal entry of zero, NaN or infinity marks an absent row.
        """
        check_gram(gram)
        order = torch.arange(len(gram), device=gram.device)
        accepted, distances, signals = (by_order[0] for by_order in walk(self, gram, order[None]))
        decision = self.conclude(accepted, distances)
        self.learn(Seen(accepted, distances, gram.diagonal(), signals, gram))
        return decision


def walk(
    policy: Sequential, gram: Float64[Tensor, "k k"], orders: Int[Tensor, "s m"]
) -> tuple[Bool[Tensor, "s k"], Float64[Tensor, "s k"], Float64[Tensor, "s k"]]:
    """Visits the rows in each of s orders at once: O(s m k), without waiting for the device.

    Args:
        policy: gives the rule.
        gram: (k, k).
        orders: (s, m), each the indices of m different rows; m may be less than k.

    Returns:
        By row: accepted, distances, and the signals <s, g_i> / c, each an estimate of |g|^2. The
        signal is NaN for the start and for absent rows. Rows that an order does not visit are not
        accepted, with 0 for the numbers.
    """
    norms2, sound = gram.diagonal(), is_present(gram.diagonal())
    gram = torch.where(sound & sound[:, None], gram, 0.0)
    s, k = len(orders), len(gram)
    inner = gram.new_zeros(s, k)  # <running sum, g_i>
    norm2, count = gram.new_zeros(s), torch.zeros(s, dtype=torch.int64, device=gram.device)
    accepted = torch.zeros(s, k, dtype=torch.bool, device=gram.device)
    distances, signals = gram.new_zeros(s, k), gram.new_zeros(s, k)
    for row in orders.unbind(1):
        here = row[:, None]
        inner_row, own, shrink = inner.gather(1, here)[:, 0], norms2[row], policy.shrink(count)
        joins, distance = policy.visit(count, inner_row, norm2, own)
        signals.scatter_(1, here, signal_of(policy, count, inner_row, own)[:, None])
        after = norm2_after(norm2, inner_row, gram.diagonal()[row], shrink)
        norm2 = torch.where(joins, after, norm2)
        inner = torch.where(joins[:, None], (inner + gram[row]) * shrink[:, None], inner)
        count = count + joins
        accepted.scatter_(1, here, joins[:, None])
        distances.scatter_(1, here, distance[:, None])
    return accepted, distances, signals


def signal_of(
    policy: Sequential,
    count: Int[Tensor, "*s"],
    inner: Float64[Tensor, "*s"],
    own: Float64[Tensor, "*s"],
) -> Float64[Tensor, "*s"]:
    """<s, g> over the number of rows that s adds up: an estimate of |g|^2.

    NaN for a row that was compared with nothing.
    """
    terms = count if policy.average == "mean" else count.clamp_max(1)
    return torch.where(is_present(own) & (count > 0), inner / terms, math.nan)


def norm2_after(
    norm2: Float64[Tensor, "*s"],
    inner: Float64[Tensor, "*s"],
    own: Float64[Tensor, "*s"],
    shrink: Float64[Tensor, "*s"],
) -> Float64[Tensor, "*s"]:
    """|shrink (s + g)|^2 from |s|^2, <s, g> and |g|^2."""
    return (norm2 + 2 * inner + own).clamp_min(0) * shrink**2


def mean_weights(accepted: Bool[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """Weights of the rows in the average of the accepted ones."""
    return accepted.double() / accepted.sum().clamp_min(1)


def halving_weights(accepted: Bool[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """Weights of the rows in the sum that is halved at each acceptance, in the order of the visit.

    1/2 for the last accepted row, 1/4 for the one before, ...; the first has what is left.
    """
    count = accepted.cumsum(0)
    after = count[-1] - count
    exponent = torch.where(count == 1, after, after + 1)
    return torch.where(accepted, 0.5 ** exponent.double(), 0.0)
