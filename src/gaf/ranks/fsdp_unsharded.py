"""A flat FSDP2 model, exactly: each rank keeps an unsharded gradient until the decision.

FSDP2 adds up the ranks' gradients as it shards them. In place of its reduce-scatter the same bytes
go by all-to-all, so that each rank holds all W values of each coordinate of its shard: as much as
one unsharded gradient. One decision covers them all at the end of the pass. There is no way out,
because each rank's part of the update is its shard.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from gaf.ranks.arrival_hooks import ArrivalHooks
from gaf.ranks.exchange import Exchange, Parcel
from gaf.ranks.fsdp import sharded_parameters, watch_passes
from gaf.ranks.fsdp_groups import check_reduction, fsdp_modules
from gaf.ranks.handle import Handle
from gaf.ranks.metric import moments_for, roots_in_shard
from gaf.rules.combine import combine_into
from gaf.rules.contract import Merge
from gaf.rules.merging import merge_into
from gaf.rules.second_moments import SecondMoments


def install_unsharded(
    model: nn.Module, handle: Handle, exchange: Exchange, shards: Sequence[dist.ProcessGroup]
) -> None:
    """Has the handle take one decision on all gradients of a flat model."""
    groups = handle.summed_groups = [exchange.group, *shards]
    kept = KeptRows(exchange.group, exchange.micro_group)
    hooks = ArrivalHooks(handle, sharded_parameters(model), kept.place)
    for module in fsdp_modules(model):
        module.set_custom_reduce_scatter(KeepingReduceScatter(kept))
        handle.on_detach(partial(module.set_custom_reduce_scatter, DefaultReduceScatter()))

    def begin() -> None:
        hooks.place()
        kept.begin()
        kept.moments = moments_for(handle)

    def end() -> None:
        if kept.places:
            params = list(dict.fromkeys(place.p for place in kept.places))
            handle.stale.reach(params)
            handle.begin()
            handle.settle(kept, params, groups)
            handle.end()

    watch_passes(model, handle, begin, end)


class KeepingReduceScatter(DefaultReduceScatter):
    """In place of the reduce-scatter: the way in. The shard is zeros until the decision."""

    def __init__(self, kept: "KeptRows") -> None:
        super().__init__()
        self.kept = kept

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        check_reduction(op)
        if input_tensor.dtype == torch.float16:
            raise TypeError(
                "attach: with unsharded=True gradients must be reduced in float32 or bfloat16; got "
                "float16, which FSDP2 scales. Use MixedPrecisionPolicy(reduce_dtype=torch.float32)."
            )
        self.kept.take(input_tensor)
        output_tensor.zero_()
        return None


class Place(NamedTuple):
    """Where a parameter's coordinates lie in a parcel."""

    p: Any
    parcel: Parcel
    start: int


class KeptRows(Exchange):
    """An exchange with a parcel for each reduction, whose update stays sliced.

    Attributes:
        places: those of the parameters, in the order of the reductions.
    """

    def __init__(self, group: dist.ProcessGroup, micro_group: int = 1) -> None:
        super().__init__(group, micro_group)
        self.places: list[Place] = []
        self.moments: SecondMoments | None = None  # the optimizer's, for its metric
        self._filled = 0  # coordinates of the last parcel that belong to parameters so far

    def begin(self) -> None:
        super().begin()
        self.places = []

    def take(self, whole: Tensor) -> None:
        """Starts the way in. whole: this rank's gradients of a parameter group, (W c,)."""
        self.device = whole.device
        self._release()
        self._post(whole)
        self._filled = 0

    def _release(self) -> None:
        """Lets go of this rank's values once they are sent."""
        for parcel in self.parcels[-1:]:
            parcel.wait()
            if parcel.whole.is_cuda:
                parcel.whole.record_stream(torch.cuda.current_stream())
            parcel.whole = parcel.whole[:0].clone()

    def place(self, p: Tensor) -> None:
        """FSDP2 takes a parameter's shard out of the last reduction: one after the other."""
        if self.parcels:
            self.places.append(Place(p, self.parcels[-1], self._filled))
            self._filled += padded_shard_size(p, self.W)

    def receive(self) -> None:
        self._release()
        super().receive()
        for p, parcel, start in self.places if self.moments is not None else ():
            assert self.moments is not None
            root = roots_in_shard(self.moments, p)
            if parcel.roots is None:
                parcel.roots = root.new_zeros(parcel.rows.shape[1], device=self.device)
            parcel.roots[start : start + len(root)] = root

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        before, first = self.origin, dist.get_rank(self.group)
        starts = {}
        for parcel in self.parcels:
            starts[parcel] = before + first * parcel.rows.shape[1]
            before += parcel.slices.numel()
        for p, parcel, start in self.places:
            local = p.grad.to_local().view(-1)
            rows = parcel.rows[:, start : start + len(local)]
            update = torch.empty_like(rows[0])
            if merge is None:
                combine_into(update, rows, weights)
            else:
                merge_into(update, list(rows), weights, merge, starts[parcel] + start)
            local.add_(update.to(local.device))

    def fill(self, value: float) -> None:
        for p, *_ in self.places:
            p.grad.to_local().fill_(value)

    def end(self) -> None:
        self.begin()  # the memory is an unsharded gradient's: not to be kept


def padded_shard_size(p: Any, W: int) -> int:
    """Coordinates of a parameter's shard in FSDP2's reductions, which pad it to equal shards."""
    length = p.shape[p.placements[0].dim]
    return -(-length // W) * (p.numel() // length) if length else 0
