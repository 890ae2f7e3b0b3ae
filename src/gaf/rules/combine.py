"""From rows and a Decision to the update: w^T G."""

import torch
from torch import Tensor

from gaf.rules.contract import Policy, check_policy
from gaf.rules.decision import Decision, check_decision
from gaf.rules.gram import check_rows, gram
from gaf.shapes import Float, Float64


def aggregate(rows: Float[Tensor, "k n"], policy: Policy) -> tuple[Float[Tensor, " n"], Decision]:
    """The whole algorithm on a matrix: Gram, policy, combine.

    Args:
        rows: (k, n), one micro-gradient a row; float16, bfloat16, float32 or float64.
        policy: what decides, such as `gaf.GAF(0.97)`.

    Returns:
        The update, (n,) in the rows' dtype, zeros where not stepped, and the Decision.

    Raises:
        ValueError, TypeError: where `rows` is not such a matrix, the policy no callable, or what it returns no Decision about them.

    >>> from gaf import GAF
    >>> update, decision = aggregate(torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]), GAF(tau=0.5))
    >>> update, decision.accepted
    (tensor([0.9000, 0.3000]), tensor([ True,  True, False]))
    """
    check_rows(rows)
    check_policy(policy, "aggregate")
    K = gram(rows)
    decision = check_decision(policy(K), policy, len(rows), K.device)
    return combine(decision.weights, rows), decision


def combine(weights: Float64[Tensor, " k"], rows: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """w^T G, in row order; a row of weight zero is never multiplied, since 0 x NaN is NaN. Half precision adds in float32."""
    wide = rows.dtype if rows.dtype in (torch.float32, torch.float64) else torch.float32
    total = torch.zeros(rows.shape[1], dtype=wide, device=rows.device)
    for weight, row in zip(weights.to(wide), rows, strict=True):
        total += torch.where(weight != 0, weight * row.to(wide), 0)
    return total.to(rows.dtype)
