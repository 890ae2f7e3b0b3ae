"""A flat FSDP2 model: each parameter group decides for itself, in place of its reduce-scatter."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.rules.combine import combine_into
from gaf.rules.contract import Merge
from gaf.rules.merging import merge_into


class GroupwiseShards:
    """scope="group": one decision at each reduction of a parameter group's gradients."""

    def __init__(self, handle: Handle, model: nn.Module, exchange: Exchange) -> None:
        self.handle = handle
        handle.summed_groups = [exchange.group]
        self.current = -1  # the pass that is in progress
        for module in fsdp_modules(model):
            self._install(module, exchange)

    def _install(self, module: FSDPModule, exchange: Exchange) -> None:
        params = [p for group in grouped_parameters(module) for p in group]
        settle = partial(self._settle, params)
        scatter = FilteringReduceScatter(settle, exchange.group, exchange.micro_group)
        module.set_custom_reduce_scatter(scatter)
        undo = partial(module.set_custom_reduce_scatter, DefaultReduceScatter())
        self.handle.on_detach(undo)

    def _settle(self, params: list[nn.Parameter], exchange: Exchange) -> None:
        self.handle.stale.reach(params)
        if self.current != torch._C._current_graph_task_id():
            self.current = torch._C._current_graph_task_id()
            self.handle.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self.handle.end)
        self.handle.settle(exchange, params, [exchange.group])


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def grouped_parameters(module: FSDPModule) -> list[list[nn.Parameter]]:
    """A module's parameters, as FSDP2 reduces them together."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        groups = list(state._fsdp_param_groups)
    else:
        groups = [group for group in [state._fsdp_param_group] if group]
    return [[p.sharded_param for p in group.fsdp_params] for group in groups]


def check_reduction(op: Any) -> None:
    if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
        raise TypeError(
            "attach: FSDP2's gradient divide factor must be the default one; got another. "
            "Leave set_gradient_divide_factor out: the accepted rows are averaged."
        )


class FilteringReduceScatter(DefaultReduceScatter):
    """In place of the reduce-scatter: the same way in, Gram, decision.

    There is no way out: the shard of w^T G is already where it belongs.
    """

    def __init__(
        self, settle: Callable[[Exchange], None], group: dist.ProcessGroup, micro_group: int
    ) -> None:
        super().__init__()
        self.settle, self.exchange = settle, OneWay(group, micro_group)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        check_reduction(op)
        factor = 1.0 if op == dist.ReduceOp.AVG else float(self.exchange.W)
        self.exchange.load(input_tensor, output_tensor, factor)
        self.settle(self.exchange)
        return None


class OneWay(Exchange):
    """An exchange whose update stays sliced, as FSDP2 lays it out.

    Attributes:
        shard: (c,), where the update goes.
        factor: to multiply the update by.
    """

    def __init__(self, group: dist.ProcessGroup, micro_group: int = 1) -> None:
        super().__init__(group, micro_group)
        self.shard = torch.empty(0)
        self.factor = 1.0

    def load(self, whole: Tensor, shard: Tensor, factor: float) -> None:
        """Starts the way in. whole: this rank's gradients of the group, (W c,)."""
        self.begin()
        self.shard, self.factor = shard, factor
        self._post(whole)

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        rows = self.parcels[0].rows
        if merge is None:
            combine_into(self.shard, rows, [w * self.factor for w in weights])
            return
        place = self.origin + dist.get_rank(self.group) * self.shard.numel()
        merge_into(self.shard, list(rows), weights, merge, place, self.factor)

    def fill(self, value: float) -> None:
        self.shard.fill_(value)

    def end(self) -> None:
        self.begin()  # the memory is an unsharded gradient's: not to be kept
