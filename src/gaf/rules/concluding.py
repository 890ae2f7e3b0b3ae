"""From the rows that a visit accepted to the Decision, in tensors of any device or on the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.rules.decision import Decision
from gaf.rules.sequential import halving_weights, mean_weights
from gaf.shapes import Bool, Float64, Int


def decide_in_order(
    accepted: Bool[Tensor, " k"],
    distances: Float64[Tensor, " k"],
    order: Int[Tensor, " k"],
    average: str,
    least: int,
) -> Decision:
    """The decision about rows that were visited in this order: a skip below `least` accepted."""
    stepped = accepted.sum() >= least
    accepted = accepted & stepped
    visit_weights = mean_weights if average == "mean" else halving_weights
    weights = torch.zeros_like(distances)
    weights[order] = visit_weights(accepted[order])
    return Decision(weights, accepted, stepped, distances)


def plain_weights(accepted: Sequence[bool], average: str) -> list[float]:
    """`mean_weights` or `halving_weights` of `gaf.rules.sequential`."""
    count = sum(accepted)
    if average == "mean":
        return [taken / max(count, 1) for taken in accepted]
    weights, after = [0.0] * len(accepted), count
    for i in (i for i, taken in enumerate(accepted) if taken):
        after -= 1
        weights[i] = 0.5 ** (after if after == count - 1 else after + 1)
    return weights


def decide_on_host(
    accepted: Sequence[bool],
    distances: Float64[Tensor, " k"],
    order: Sequence[int],
    average: str,
    least: int,
) -> Decision:
    """`decide_in_order` in plain numbers."""
    stepped, weights = sum(accepted) >= least, [0.0] * len(accepted)
    if stepped:
        in_order = plain_weights([accepted[i] for i in order], average)
        for i, weight in zip(order, in_order, strict=True):
            weights[i] = weight
    return Decision(
        torch.tensor(weights, dtype=torch.float64, device="cpu"),
        torch.tensor([stepped and taken for taken in accepted], device="cpu"),
        torch.tensor(stepped, device="cpu"),
        distances,
    )
