"""The optimizer's metric across ranks: each has v of the coordinates that it holds, and sends none.

After the way in a rank holds all rows' values of a slice of the coordinates. Of a replicated model
it has all of v, and of a sharded one v of its own shard: so the slice's part of M is at hand.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gaf.ranks.handle import Handle
from gaf.ranks.sent_piece import SentPiece
from gaf.rules.contract import metric_of
from gaf.rules.second_moments import SecondMoments


def moments_for(handle: Handle) -> SecondMoments | None:
    """The optimizers' second moments for the pass that begins; None for a plain metric."""
    if metric_of(handle.policy) != "optimizer":
        return None
    moments = SecondMoments(handle.steps.progress)
    return moments if any(map(moments.knows, handle.stale.params)) else None


def roots_in_bucket(
    moments: SecondMoments, params: Sequence[Tensor], flat: Tensor, start: int, stop: int
) -> Tensor:
    """sqrt(M) at coordinates start to stop of a bucket, zeros where a parameter has no v.

    params: that the bucket `flat` holds, in its order.
    """
    parts, place = [flat.new_empty(0)], 0
    for p in params:
        a, b = max(start - place, 0), min(stop - place, p.numel())
        if a < b:
            root = moments.root_at(p, partial(cut_as_in_bucket, p, a, b))
            parts.append(flat.new_zeros(b - a) if root is None else root)
        place += p.numel()
    return torch.cat(parts)


def cut_as_in_bucket(p: Tensor, start: int, stop: int, v: Tensor) -> Tensor:
    """Coordinates of a parameter's state in the order in which DDP lays out its gradient.

    That is the order of the parameter's own strides, if these leave no gaps.
    """
    if p.is_contiguous() or torch.empty_like(p, device="meta").stride() != p.stride():
        return v.reshape(-1)[start:stop]
    order = sorted(range(p.ndim), key=p.stride, reverse=True)
    return v.permute(order).reshape(-1)[start:stop]


class ShardPiece(SentPiece):
    """This rank's shard of a parameter's gradient.

    Args:
        flat: the shard.
        p: the parameter.
        moments: the optimizer's; None for a plain metric.
    """

    def __init__(self, flat: Tensor, p: Any, moments: SecondMoments | None) -> None:
        super().__init__(flat)
        self.p, self.moments = p, moments

    def roots(self, start: int, stop: int) -> Tensor | None:
        if self.moments is None:
            return None
        return roots_in_shard(self.moments, self.p, start, stop).to(self.flat.device)


def roots_in_shard(
    moments: SecondMoments, p: Any, start: int = 0, stop: int | None = None
) -> Tensor:
    """sqrt(M) at coordinates start to stop of this rank's shard of p, zeros without a v."""

    def cut(v: Any) -> Tensor:
        part: Tensor = v.to_local().reshape(-1)[start:stop]
        return part

    root = moments.root_at(p, cut)
    return torch.zeros_like(cut(p.detach())) if root is None else root
