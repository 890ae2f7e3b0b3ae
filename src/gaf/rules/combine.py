"""From rows and a Decision to the update: w^T G.

Three forms of one sum, which give the same update up to rounding:

    combine        weights on the rows' device: the host is not waited for
    combine_into   weights on the host, into a buffer: one pass over each row
    weighted_sum   weights on the host, for one parameter that some rows have no gradient for

In all of them a row of weight zero is left out and not multiplied, since 0 x NaN is NaN. A
coordinate-wise rule has no weights: `gaf.rules.merging` makes its update.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.rules.asking import ask
from gaf.rules.contract import Policy, check_policy, merge_of
from gaf.rules.decision import Decision, check_weights
from gaf.rules.gram import check_rows, gram
from gaf.rules.merging import merge_into
from gaf.rules.second_moments import check_no_optimizer_metric
from gaf.rules.sequential import Sequential
from gaf.shapes import Float, Float64


def aggregate(rows: Float[Tensor, "k n"], policy: Policy) -> tuple[Float[Tensor, " n"], Decision]:
    """The whole algorithm on a matrix: Gram, policy, combine.

    Args:
        rows: (k, n), one micro-gradient a row; float16, bfloat16, float32 or float64.
        policy: what decides, such as `gaf.GAF(0.97)`, or any function from K to a Decision or to
            weights (k,).

    Returns:
        The update, (n,) in the rows' dtype, zeros where not stepped, and the Decision.

    Raises:
        ValueError, TypeError: if `rows` is not such a matrix, `policy` is not callable, or what
            it returns is not a Decision about these rows, or one that steps with weights that are
            not finite.

    >>> from gaf import GAF
    >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    >>> update, decision = aggregate(rows, GAF(tau=0.5))
    >>> update, decision.accepted
    (tensor([0.9000, 0.3000]), tensor([ True,  True, False]))
    """
    check_rows(rows)
    check_policy(policy, "aggregate")
    check_no_optimizer_metric(policy, "aggregate", "a matrix of rows has no optimizer")
    decision, merge = ask(policy, gram(rows)), merge_of(policy)
    if not isinstance(policy, Sequential):  # their weights are finite: the device is not waited for
        check_weights(decision.weights.tolist(), bool(decision.stepped), policy)
    if merge is None:
        return combine(decision.weights, rows), decision
    update = torch.empty_like(rows[0])
    merge_into(update, list(rows), decision.weights.tolist(), merge)
    return update, decision


def combine(weights: Float64[Tensor, " k"], rows: Tensor | Sequence[Tensor]) -> Tensor:
    """w^T G for weights on the rows' device, added in row order.

    Args:
        weights: (k,).
        rows: k tensors of one shape and dtype, or a matrix of k rows.

    Returns:
        The sum, in the rows' shape and dtype.
    """
    dtype = rows[0].dtype
    total = torch.zeros_like(rows[0], dtype=sum_dtype(dtype))
    for weight, row in zip(weights.to(total.dtype), rows, strict=True):
        total.add_(torch.where(weight != 0, row.to(total.dtype) * weight, 0))
    return total.to(dtype)


def combine_into(out: Tensor, rows: Tensor, weights: Sequence[float]) -> None:
    """out <- w^T G for weights on the host; out (c,), rows (k, c)."""
    used: list[tuple[Tensor, float]] = [(row, w) for row, w in zip(rows, weights, strict=True) if w]
    if not used:
        out.zero_()
        return
    (first, weight), *others = used
    exact = sum_dtype(out.dtype)
    total = (
        torch.mul(first, weight, out=out) if out.dtype == exact else first.to(exact).mul_(weight)
    )
    for row, weight in others:
        total.add_(row, alpha=weight)  # rounds once where weighted_sum rounds twice
    if total is not out:
        out.copy_(total)


def weighted_sum(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """The sum of weight x gradient over those terms that have a gradient; None if none has.

    The gradients are used up: fresh memory would cost a CPU more than the sum. It rounds twice for
    each term, as `combine` does: then both take the same step to the bit.
    """
    total, dtype = None, None
    for grad, weight in terms:
        if grad is None:
            continue
        dtype = grad.dtype
        term = grad.to(sum_dtype(dtype)).mul_(weight)
        total = term if total is None else total.add_(term)
    return None if total is None else total.to(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which gradients of this dtype are added up: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
