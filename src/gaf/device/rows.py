"""Holds the micro-gradients of one macro-batch until the decision.

They are added up as they come (`StreamedRows`) or kept apart (`StackedRows`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.device.buffers import Buffers, norm2_of_rest, voting_part
from gaf.device.sums import SumOnCpu, SumOnDevice
from gaf.rules.combine import combine, weighted_sum
from gaf.rules.contract import Policy, merge_of
from gaf.rules.decision import Decision, Evidence, check_decision
from gaf.rules.gram import gram_of
from gaf.rules.judging import decide_with_evidence, streams, tau_of
from gaf.rules.merging import merged_parameters
from gaf.rules.sequential import Seen, Sequential, norm2_after, signal_of
from gaf.shapes import Float64


def rows_for(
    policy: Policy, voters: Sequence[bool], spare: Buffers, device: torch.device
) -> "StreamedRows | StackedRows":
    """The holder that a policy needs.

    Args:
        policy: what will decide.
        voters: which parameters take part in the decision.
        spare: buffers of an earlier macro-batch, which may be written over.
        device: of the parameters.
    """
    if device.type != "cpu" or not streams(policy):
        return rows_without_waiting(policy, voters, device)
    return StreamedRows(policy, SumOnCpu(voters, spare))


def rows_without_waiting(
    policy: Policy, voters: Sequence[bool], device: torch.device
) -> "StreamedRows | StackedRows":
    """The holder that a policy needs and that never waits for its device, on the CPU too."""
    if not streams(policy):
        return StackedRows(policy, voters)
    return StreamedRows(policy, SumOnDevice(voters, policy.average == "halving", device))


class StreamedRows:
    """The running sum and the current row.

    One gradient-sized buffer beyond plain accumulation, whatever k.

    Args:
        policy: gives the accept rule (`visit`) and the decision (`conclude`).
        sum: holds s, and takes the rows.
    """

    def __init__(self, policy: Sequential, sum: SumOnCpu | SumOnDevice) -> None:
        self.policy, self.sum = policy, sum
        # whether the current row has a gradient for each parameter
        self.has_gradient: list[bool] = [False] * len(sum.voters)
        self.had_gradient: list[list[bool]] = []  # the same for every row before
        self.count = torch.zeros((), dtype=torch.int64, device=sum.device)
        self.norm2 = torch.zeros((), dtype=torch.float64, device=sum.device)  # |s|^2
        self.accepted: list[Tensor] = []
        self.distances: list[Tensor] = []
        self.norms2: list[Tensor] = []
        # <s, g_i> / c, an estimate of |g|^2 for each row but the start
        self.signals: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.had_gradient)

    @property
    def spare(self) -> Buffers:
        return self.sum.spare

    def take(self, j: int, grad: Tensor) -> None:
        """Adds parameter j's gradient to the row, as it arrives in the backward pass."""
        self.has_gradient[j] = True
        self.sum.take(j, grad)

    def drop(self) -> None:
        """Drops the row whose backward pass failed."""
        self.has_gradient = [False] * len(self.has_gradient)
        self.sum.drop()

    def add(self) -> None:
        """Visits the row, which is complete now."""
        inner, own = self.sum.measure()
        count, norm2 = self.count, self.norm2
        joins, distance = self.policy.visit(count, inner, norm2, own)
        shrink = self.policy.shrink(count)
        self.sum.absorb(joins, shrink, counts=self.policy.adds_absent)
        self.accepted.append(joins)
        self.distances.append(distance)
        self.norms2.append(own)
        self.signals.append(signal_of(self.policy, count, inner, own))
        self.norm2 = torch.where(joins, norm2_after(norm2, inner, own, shrink), norm2)
        self.count = count + joins
        self.had_gradient.append(self.has_gradient)
        self.has_gradient = [False] * len(self.has_gradient)

    def decide(self) -> tuple[Decision, Evidence]:
        accepted, distances = torch.stack(self.accepted), torch.stack(self.distances)
        norms2, signals = torch.stack(self.norms2), torch.stack(self.signals)
        tau = tau_of(self.policy, self.norm2)
        decision = self.policy.conclude(accepted, distances)
        check_decision(decision, self.policy, len(self), accepted.device)
        self.policy.learn(Seen(accepted, distances, norms2, signals, gram=None))
        return decision, Evidence(norms2, signals.nanmean(), tau)

    def update(self, weights: list[float]) -> Buffers:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [had for had, weight in zip(self.had_gradient, weights, strict=True) if weight]
        if self.policy.average == "mean" and {w for w in weights if w} != {max(weights)}:
            raise ValueError(
                f"policy {self.policy!r}: a policy whose rows stream must weigh them alike; got "
                f"weights {weights}. Override __call__, not conclude: then the rows are kept."
            )
        columns = zip(*used, strict=True)
        pairs = zip(self.sum.update, columns, strict=True)
        total = [s if any(column) else None for s, column in pairs]
        if self.policy.average == "mean":
            torch._foreach_mul_([t for t in total if t is not None], max(weights))
        return total

    def update_on_device(self, weights: Float64[Tensor, " k"]) -> list[Tensor]:
        """w^T G for weights that stay on the device.

        Every row must have a gradient for every parameter. Has no meaning after a skip.
        """
        total = [s for s in self.sum.update if s is not None]
        if self.policy.average == "mean":
            torch._foreach_mul_(total, weights.max().to(total[0].dtype))
        return total


class StackedRows:
    """All k rows, for policies that need them apart."""

    def __init__(self, policy: Policy, voters: Sequence[bool]) -> None:
        self.policy, self.voters = policy, voters
        self.spare: Buffers = [None] * len(voters)
        self.row: Buffers = [None] * len(voters)
        self.rows: list[Buffers] = []

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, j: int, grad: Tensor) -> None:
        self.row[j] = grad

    def drop(self) -> None:
        self.row = [None] * len(self.voters)

    def add(self) -> None:
        self.rows.append(self.row)
        self.drop()

    def decide(self) -> tuple[Decision, Evidence]:
        gram = gram_of([voting_part(row, self.voters) for row in self.rows])
        for own, row in zip(gram.diagonal(), self.rows, strict=True):
            own += norm2_of_rest(row, self.voters)
        return decide_with_evidence(self.policy, gram)

    def update(self, weights: list[float]) -> Buffers:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [(row, w) for row, w in zip(self.rows, weights, strict=True) if w]
        merge = merge_of(self.policy)
        if merge is not None:
            return merged_parameters([row for row, _ in used], merge)
        return [weighted_sum([(row[j], w) for row, w in used]) for j in range(len(self.voters))]

    def update_on_device(self, weights: Float64[Tensor, " k"]) -> list[Tensor]:
        """w^T G for weights that stay on the device, as `StreamedRows.update_on_device`."""
        assert merge_of(self.policy) is None
        columns = zip(*self.rows, strict=True)
        return [combine(weights, [g for g in column if g is not None]) for column in columns]
