"""A policy is asked: K in, a Decision out, also from a policy that returns plain weights."""

import zlib
from array import array
from typing import Any

import torch
from torch import Tensor

from gaf.rules.averaging import Mean
from gaf.rules.contract import Policy, sees_present_only
from gaf.rules.decision import Decision, check_decision
from gaf.rules.gram import is_present
from gaf.rules.sequential import Sequential, walk
from gaf.shapes import Bool, Float64


def ask(policy: Policy, gram: Float64[Tensor, "k k"]) -> Decision:
    """The policy's Decision about all k rows.

    Raises:
        TypeError, ValueError: if it returns neither a Decision about these rows nor k weights.
    """
    if not sees_present_only(policy):
        return as_decision(call(policy, gram), policy, gram)
    present = is_present(gram.diagonal())
    if not present.any():
        return decide_by_weights(torch.zeros_like(gram.diagonal()), gram)
    part = gram[present][:, present]
    return spread(as_decision(call(policy, part), policy, part), present)


def call(policy: Policy, gram: Float64[Tensor, "k k"]) -> Any:
    """What the policy returns.

    What it draws from torch's generator on the CPU is seeded by K, so that ranks with other seeds
    draw the same, and the draws of the training go on as they would without it.
    """
    if isinstance(policy, Sequential):
        return policy(gram)
    gram = gram.clone()  # it may write into it
    if gram.device.type != "cpu":
        return policy(gram)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(array("d", gram.diagonal().tolist())))
        return policy(gram)


def as_decision(found: Any, policy: Policy, gram: Float64[Tensor, "k k"]) -> Decision:
    if not isinstance(found, Tensor):
        return check_decision(found, policy, len(gram), gram.device)
    check_plain_weights(found, policy, len(gram))
    return decide_by_weights(found.detach().to(gram.device, torch.float64), gram)


def decide_by_weights(weights: Float64[Tensor, " k"], gram: Float64[Tensor, "k k"]) -> Decision:
    """Accepts the rows whose weight is not zero, and steps if there is one.

    An absent row's weight counts as zero. Distances are those that `Mean` reports.
    """
    weights = torch.where(is_present(gram.diagonal()), weights, 0.0)
    accepted = weights != 0
    return Decision(weights, accepted, accepted.any(), distances_in_order(gram))


def distances_in_order(gram: Float64[Tensor, "k k"]) -> Float64[Tensor, " k"]:
    """Each present row's distance to the sum of those before it; 0 for the first."""
    order = torch.arange(len(gram), device=gram.device)
    return walk(Mean(), gram, order[None])[1][0]


def spread(decision: Decision, present: Bool[Tensor, " k"]) -> Decision:
    """The decision about the present rows as one about all k."""

    def at_present(values: Tensor, elsewhere: Any) -> Tensor:
        spread_out = torch.full_like(present, elsewhere, dtype=values.dtype)
        return spread_out.masked_scatter(present, values)

    return Decision(
        weights=at_present(decision.weights, 0.0),
        accepted=at_present(decision.accepted, False),
        stepped=decision.stepped,
        distances=at_present(decision.distances, torch.nan),
    )


def check_plain_weights(weights: Tensor, policy: Policy, k: int) -> None:
    """ValueError if these are not k floating-point numbers. Looks at no value."""
    if tuple(weights.shape) != (k,) or not weights.is_floating_point():
        raise ValueError(
            f"policy {policy!r}: plain weights must be a floating-point tensor with one for each "
            f"of the {k} rows; got shape {tuple(weights.shape)} of {weights.dtype}. "
            "Return weights of shape (k,), or a gaf.Decision."
        )
