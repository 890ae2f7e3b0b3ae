"""A flat FSDP2 model under `Mean`: FSDP2's own reduction, and what its input and output show.

Each rank knows |g_i|^2 from what it puts into a reduce-scatter, and its shard of the sum S from
what comes out. |S|^2 adds up over the shards, and gives the noise scale with the norms. No rank
ever sees its own g_i beside all of S, so the rows' cosines stay unknown.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from gaf.ranks.exchange import Exchange
from gaf.ranks.fsdp_groups import grouped_parameters
from gaf.ranks.handle import Handle
from gaf.rules.averaging import measures_next
from gaf.rules.blas import gram_by_blas
from gaf.rules.contract import Merge
from gaf.rules.row_sums import NormSums
from gaf.shapes import Float64


class FlatAverage:
    """Follows the passes of a model whose gradients FSDP2 averages."""

    def __init__(self, handle: Handle, modules: list[FSDPModule], exchange: Exchange) -> None:
        self.handle, self.norms = handle, Norms(exchange.group)
        handle.summed_groups = [exchange.group]
        self.reached: list[nn.Parameter] = []  # by the pass in progress
        for module in modules:
            params = [p for group in grouped_parameters(module) for p in group]
            scatter = WatchedReduceScatter(self.norms, partial(self.reached.extend, params))
            module.set_custom_reduce_scatter(scatter)
            undo = partial(module.set_custom_reduce_scatter, DefaultReduceScatter())
            handle.on_detach(undo)

    def begin(self) -> None:
        """A backward pass has begun. It may be one that reaches no parameter."""
        self.reached.clear()
        self.norms.begin()
        self.norms.wanted = measures_next(self.handle.policy)

    def end(self) -> None:
        """The backward pass is over."""
        if not self.reached:
            return
        params = list(self.reached)
        self.handle.stale.reach(params)
        self.handle.begin()
        if self.norms.wanted:
            self.handle.settle(self.norms, params, [self.norms.group])
        else:
            self.handle.decide_unseen(params)
        self.handle.end()


class Norms(Exchange):
    """An exchange that sends nothing, and has norms only: the average is FSDP2's.

    Attributes:
        wanted: whether the pass is measured.
        known: (2,) float64 of each reduction: this rank's |g|^2, and |S|^2 on its shard.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        super().__init__(group)
        self.wanted = False
        self.known: list[Tensor] = []

    def begin(self) -> None:
        self.known = []

    def receive(self) -> None:
        """Nothing: FSDP2 waits for its reductions."""

    def local_products(self) -> Float64[Tensor, "k 2"]:
        """In this rank's row: |g|^2, and its share of |S|^2."""
        mine = torch.stack(self.known).sum(0)
        known = mine.new_zeros(self.k, 2)
        known[dist.get_rank(self.group)] = mine
        return known

    def seen_in(self, total: Float64[Tensor, "k 2"]) -> NormSums:
        norms2, shares = total.unbind(1)
        return NormSums(norms2, torch.full_like(norms2, torch.nan), shares.sum())

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        """Nothing: every rank has its shard of the average."""

    def end(self) -> None:
        self.begin()


class WatchedReduceScatter(DefaultReduceScatter):
    """FSDP2's own reduce-scatter. reached: called at each reduction."""

    def __init__(self, norms: Norms, reached: Any) -> None:
        super().__init__()
        self.norms, self.reached = norms, reached

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self.reached()
        wanted = self.norms.wanted
        own = squared_norm(input_tensor) if wanted else None
        work = super().__call__(output_tensor, input_tensor, group, op, async_op)
        if own is not None:
            if work is not None:
                work.wait()
            ranks = self.norms.W if op == dist.ReduceOp.AVG else 1
            unit = divided_by(input_tensor.dtype, self.norms.W)
            pair = torch.stack([own, squared_norm(output_tensor) * ranks**2])
            self.norms.known.append(pair * unit**2)
        return work


def squared_norm(flat: Tensor) -> Float64[Tensor, ""]:
    return gram_by_blas(flat.view(1, -1)).view(())


def divided_by(dtype: torch.dtype, ranks: int) -> int:
    """What FSDP2 divides gradients of a dtype by before it reduces them, so that none overflows.

    About the square root of the number of ranks, for dtypes other than float32 and bfloat16.
    """
    factor = 1
    if dtype not in (torch.float32, torch.bfloat16):
        while ranks % factor == 0 and ranks / factor > factor:
            factor *= 2
    return factor
