"""The update of a coordinate-wise rule, chunk by chunk: what `combine` is for weights.

Such a rule gives each coordinate of the update from the k values of that coordinate. It is a policy
with a method `merge`: called on K it decides which rows count, and `merge` makes the update of
them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.rules.contract import Merge
from gaf.rules.slices import Row, chunk_on


def merge_into(
    out: Tensor,
    rows: Sequence[Tensor],
    weights: Sequence[float],
    merge: Merge,
    place: int = 0,
    factor: float = 1.0,
) -> None:
    """out <- factor times the rule's update from the rows whose weight is not zero.

    Args:
        out: (c,).
        rows: k vectors (c,).
        weights: k numbers, all zero for a skip, whose update is zeros.
        merge: the rule.
        place: of the first coordinate.
        factor: to multiply by.
    """
    used = [row for row, weight in zip(rows, weights, strict=True) if weight]
    if not used:
        out.zero_()
        return
    exact, size = torch.promote_types(out.dtype, torch.float32), chunk_on(out.device)
    for start in range(0, len(out), size):
        block = torch.stack([row[start : start + size] for row in used]).to(exact)
        update = merge(block, place + start)
        if update.shape != block.shape[1:]:
            raise ValueError(
                f"merge of a policy must give one number for each of the {block.shape[1]} "
                f"coordinates of the rows, ({block.shape[1]},); got shape {tuple(update.shape)}. "
                "Reduce over the rows alone, such as rows.mean(0)."
            )
        out[start : start + size] = update if factor == 1.0 else update * factor


def merged_parameters(rows: Sequence[Row], merge: Merge) -> list[Tensor | None]:
    """The update, a tensor per parameter, from the accepted rows; None where none has a gradient.

    A row without a gradient counts as zeros.
    """
    found: list[Tensor | None] = []
    place = 0
    for column in zip(*rows, strict=True):
        some = next((g for g in column if g is not None), None)
        found.append(None if some is None else merged(column, some, merge, place))
        place += 0 if some is None else some.numel()
    return found


def merged(column: Sequence[Tensor | None], like: Tensor, merge: Merge, place: int) -> Tensor:
    """The update of one parameter, laid out as the gradient `like`."""
    rows = [torch.zeros_like(like) if g is None else g for g in column]
    out = like.new_empty(like.numel())
    merge_into(out, [row.reshape(-1) for row in rows], [1.0] * len(rows), merge, place)
    return torch.empty_like(like).copy_(out.view(like.shape))
