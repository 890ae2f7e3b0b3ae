"""What every engine does with a policy: decide from K, keep the evidence, notice overflows."""

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from gaf.rules.agreement import mean_off_diagonal
from gaf.rules.asking import ask
from gaf.rules.averaging import Mean
from gaf.rules.contract import Policy, max_norm_ratio_of
from gaf.rules.decision import Decision, Evidence, check_decision
from gaf.rules.gram import is_present, without_giants
from gaf.rules.policies import GAF
from gaf.rules.row_sums import RowSums
from gaf.rules.sequential import Sequential
from gaf.shapes import Float64


def decide_with_evidence(policy: Policy, gram: Float64[Tensor, "k k"]) -> tuple[Decision, Evidence]:
    """The policy's decision about a Gram matrix, and what the matrix shows beside it."""
    tau = tau_of(policy, gram)
    decision = ask(policy, gram)
    ratio = max_norm_ratio_of(policy)
    compared = gram if ratio is None else without_giants(gram, ratio)
    return decision, Evidence(compared.diagonal(), mean_off_diagonal(compared), tau)


def decide_from_sums(policy: Policy, sums: RowSums) -> tuple[Decision, Evidence]:
    """The same from K's diagonal and row sums: by `policy.judge`, or `Mean`'s decision."""
    if isinstance(policy, Mean):
        decision = policy.conclude(is_present(sums.norms2), (1 - sums.cosines).clamp(0, 2))
    else:
        found = policy.judge(sums)  # type: ignore[attr-defined]
        decision = check_decision(found, policy, len(sums.norms2), sums.norms2.device)
    tau = tau_of(policy, sums.norms2)
    return decision, Evidence(sums.norms2, sums.signal, tau)


def cosines_to_others(gram: Float64[Tensor, "k k"]) -> Float64[Tensor, " k"]:
    """Each row's cosine to the sum of the other present rows; NaN for an absent row."""
    sound = is_present(gram.diagonal())
    return RowSums.of_gram(torch.where(sound & sound[:, None], gram, 0.0)).cosines


def tau_of(policy: Policy, like: Tensor) -> Float64[Tensor, ""]:
    """The policy's threshold for the rows at hand, on the device of `like`; NaN without one."""
    if isinstance(policy, GAF):
        return policy.tau_on(like.device)
    return torch.full((), torch.nan, dtype=torch.float64, device=like.device)


def join_layer_decisions(
    decisions: Sequence[Decision], evidence: Sequence[Evidence]
) -> tuple[Decision, Evidence]:
    """One decision about the whole gradient from the decisions of its layers.

    It steps if any layer steps, and accepts a row that any layer accepts. Weights and distances
    are means over the layers.
    """
    accepted = torch.stack([d.accepted for d in decisions]).any(0)
    stepped = torch.stack([d.stepped for d in decisions]).any()
    weights = torch.stack([d.weights for d in decisions]).mean(0)
    distances = torch.stack([d.distances for d in decisions]).nanmean(0)
    norms2 = torch.stack([e.norms2 for e in evidence]).sum(0)
    signal = torch.stack([e.signal for e in evidence]).nansum()
    return (
        Decision(weights, accepted, stepped, distances),
        Evidence(norms2, signal, evidence[0].tau),
    )


def has_overflow(policy: Policy, norms2: Sequence[float]) -> bool:
    """Whether rows are NaN or infinite: by their squared norms a single one, or as the policy says.

    Under a GradScaler this means that the loss scale is too high: no step may follow, whatever the
    policy decided, and the scaler must see it to lower the scale.
    """
    if hasattr(policy, "overflowed"):
        return bool(policy.overflowed(norms2))
    return not all(map(math.isfinite, norms2))


def streams(policy: Policy) -> TypeGuard[Sequential]:
    """Whether the policy decides on rows that are added up as they come."""
    return (
        isinstance(policy, Sequential)
        and policy.streams
        and type(policy).__call__ in (Sequential.__call__, GAF.__call__)
    )
