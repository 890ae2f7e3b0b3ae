"""Holds the micro-gradients of one macro-batch until the decision.

They are added up as they come (`StreamedRows`) or kept apart (`gaf.device.stacked`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf.device.buffers import Buffers, where_any, where_rooted
from gaf.device.packs import Apart, Packs, packs_for
from gaf.device.stacked import StackedRows
from gaf.device.sums import SumOnCpu, SumOnDevice
from gaf.rules.contract import Policy, merge_of
from gaf.rules.decision import Decision, Evidence, check_decision
from gaf.rules.enough import PairMeans
from gaf.rules.judging import streams, tau_of
from gaf.rules.sequential import Seen, Sequential
from gaf.rules.visits import PlainVisits, Visits, visits_for
from gaf.shapes import Float64


def rows_for(
    policy: Policy,
    voters: Sequence[bool],
    params: Sequence[Tensor],
    roots: Buffers | None = None,
) -> "StreamedRows | StackedRows":
    """The holder that a policy needs.

    Args:
        policy: what will decide.
        voters: which parameters take part in the decision.
        params: that the rows are gradients of.
        roots: sqrt(M) of a diagonal metric, for each parameter; None for a plain one. Parameters
            without a root take no part, but if none has one, the metric is plain.
    """
    device = params[0].device
    if device.type != "cpu":
        if streams(policy):
            return rows_without_waiting(policy, voters, params, roots)
        voters, roots = where_rooted(voters, roots)
        return StackedRows(policy, packs_for(params, voters), roots, decides_on_host=True)
    voters, roots = where_rooted(voters, roots)
    # a rule by coordinate counts them in the order of the parameters
    packs = packs_for(params, voters) if merge_of(policy) is None else Apart(voters)
    if not streams(policy):
        return StackedRows(policy, packs, roots)
    sum = SumOnCpu(packs.votes, None if roots is None else packs.pack(list(roots)))
    return StreamedRows(policy, sum, visits_for(policy, device), packs)


def rows_without_waiting(
    policy: Policy,
    voters: Sequence[bool],
    params: Sequence[Tensor],
    roots: Buffers | None = None,
) -> "StreamedRows | StackedRows":
    """The holder that a policy needs and that never waits for its device, on the CPU too."""
    voters, roots = where_rooted(voters, roots)
    packs = packs_for(params, voters)
    if not streams(policy):
        return StackedRows(policy, packs, roots)
    packed = None if roots is None else packs.pack(list(roots))
    sum = SumOnDevice(packs.votes, policy.average == "halving", params[0].device, packed)
    return StreamedRows(policy, sum, Visits(policy, sum.device), packs)


class StreamedRows:
    """The running sum, to which rows are added as they come.

    One gradient-sized buffer beyond plain accumulation, whatever k.

    Args:
        policy: gives the decision (`conclude`).
        sum: holds s.
        visits: applies the accept rule.
        packs: which vectors a row is made of.
    """

    def __init__(
        self,
        policy: Sequential,
        sum: SumOnCpu | SumOnDevice,
        visits: Visits | PlainVisits,
        packs: Apart | Packs,
    ) -> None:
        self.policy, self.packs = policy, packs
        # either both in plain numbers or both in tensors, or visits makes tensors of numbers
        self.sum: Any = sum
        self.visits: Any = visits
        self.had_gradient: list[list[bool]] = []  # whether each row has one for each parameter

    def __len__(self) -> int:
        return len(self.had_gradient)

    def add(self, row: Buffers) -> None:
        """Visits a row, which is used up."""
        had_gradient = [grad is not None for grad in row]
        row = self.packs.pack(row)
        joins, shrink = self.visits.visit(*self.sum.measure(row))
        self.sum.absorb(row, joins, shrink, counts=self.policy.adds_absent)
        self.had_gradient.append(had_gradient)

    def decide(self) -> tuple[Decision, Evidence]:
        seen: Seen = self.visits.seen()
        tau = tau_of(self.policy, seen.norms2)
        decision = self.policy.conclude(seen.accepted, seen.distances)
        check_decision(decision, self.policy, len(self), seen.accepted.device)
        self.policy.learn(seen)
        return decision, Evidence(seen.norms2, self.visits.signal(), tau)

    def pair_means(self) -> PairMeans:
        """K's mean off the diagonal and on it, over accepted rows, from |s|^2 and sum |g_i|^2.

        NaN for fewer than two. Waits for the device.
        """
        seen: Seen = self.visits.seen()
        own = seen.norms2[seen.accepted].sum().item()
        c = int(seen.accepted.sum())
        if c < 2:
            return PairMeans(math.nan, math.nan)
        return PairMeans((float(self.visits.norm2) - own) / (c * (c - 1)), own / c)

    def update(self, weights: list[float]) -> Buffers:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [had for had, weight in zip(self.had_gradient, weights, strict=True) if weight]
        if self.policy.average == "mean" and {w for w in weights if w} != {max(weights)}:
            raise ValueError(
                f"policy {self.policy!r}: a policy whose rows stream must weigh them alike; got "
                f"weights {weights}. Override __call__, not conclude: then the rows are kept."
            )
        total = self.sum.update
        if self.policy.average == "mean":
            torch._foreach_mul_([t for t in total if t is not None], max(weights))
        return where_any(used, self.packs.unpack(total))

    def update_on_device(self, weights: Float64[Tensor, " k"]) -> list[Tensor]:
        """w^T G for weights that stay on the device.

        Every row must have a gradient for every parameter. Has no meaning after a skip.
        """
        total = [s for s in self.sum.update if s is not None]
        if self.policy.average == "mean":
            torch._foreach_mul_(total, weights.max().to(total[0].dtype))
        return [g for g in self.packs.unpack(total) if g is not None]
