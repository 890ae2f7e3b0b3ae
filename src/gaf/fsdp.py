"""FSDP2: one decision over replicas of a sharded model (HSDP), or one for each parameter group of a flat one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.utils._pytree import tree_leaves

from gaf.exchange import Exchange, combine
from gaf.handle import Handle


def install(model: nn.Module, handle: Handle, exchange: Exchange) -> None:
    """Has the handle decide on the model's gradients: of all of it over its replicas, or of each group over its shards."""
    params = list(model.parameters())
    if getattr(handle.policy, "scope", "all") == "group":
        Groups(handle, model, exchange)
    else:
        check_same_weights(params, exchange.group)
        Replicas(handle, exchange, params, params[0].device_mesh.get_group())  # type: ignore[attr-defined]
    watch(model, params, handle)


def check_same_weights(params: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """FSDP2 does not make replicas equal at the start, as DistributedDataParallel does."""
    sums = torch.stack([p.detach().to_local().double().sum() for p in params])  # type: ignore[attr-defined]
    all_of = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of, sums, group=group)
    if not all(torch.equal(all_of[0].nan_to_num(), other.nan_to_num()) for other in all_of):
        raise ValueError("attach: the replicas must start from the same weights; theirs differ. Seed the ranks alike before building the "
                         "model, or load one checkpoint on all of them.")  # fmt: skip


def watch(model: nn.Module, params: list[nn.Parameter], handle: Handle) -> None:
    """Looks at a gradient when a backward pass begins, at the model's output: FSDP2 adds to gradients out of autograd's sight."""

    def begins(grad: Tensor) -> None:
        first = next((p.grad for p in params if p.grad is not None), None)
        handle.before_accumulation(None if first is None else first.to_local())  # type: ignore[attr-defined]

    def forward(module: nn.Module, inputs: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(begins)

    handle.on_detach(model.register_forward_hook(forward).remove)


class Replicas:
    """Compares the replicas of a sharded model, on the shards of their gradients, once the backward pass is over.

    Each rank holds a shard; the ranks of `group` hold the same shard of different replicas. The Gram matrix is added up
    over the replicas' slices and then over the shards.

    Args:
        shards: the group over which FSDP2 shards the parameters.
    """

    def __init__(
        self,
        handle: Handle,
        exchange: Exchange,
        params: list[nn.Parameter],
        shards: dist.ProcessGroup,
    ) -> None:
        self.handle, self.exchange, self.shards = handle, exchange, shards
        self.params = [p for p in params if p.requires_grad]
        self.due = False
        for p in self.params:
            handle.on_detach(p.register_post_accumulate_grad_hook(self._arrived).remove)

    def _arrived(self, p: Tensor) -> None:
        """FSDP2 has reduced a gradient: have the rest done when the whole backward pass is over."""
        if not self.due:
            self.due = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        self.due = False
        self.handle.begin()
        self.exchange.begin()
        used = self._used_somewhere()
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.exchange.send(p.grad.to_local().view(-1))  # type: ignore[attr-defined]
        self.handle.settle(self.exchange, used, [self.exchange.group, self.shards])
        self.handle.end()

    def _used_somewhere(self) -> list[nn.Parameter]:
        """Parameters that have a gradient on any replica; the others stay without one, and without a step."""
        used = torch.tensor([p.grad is not None for p in self.params], dtype=torch.uint8).to(
            self.params[0].device
        )
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.exchange.group)
        return [p for p, flag in zip(self.params, used.tolist(), strict=True) if flag]


class Groups:
    """scope="group" on a flat FSDP2 model: each parameter group decides for itself where its gradients are reduced."""

    def __init__(self, handle: Handle, model: nn.Module, exchange: Exchange) -> None:
        self.handle, self.fresh = handle, True
        for module in model.modules():
            if isinstance(module, FSDPModule):
                params = [p.sharded_param for group in groups_of(module) for p in group.fsdp_params]
                scatter = FilteringReduceScatter(
                    partial(self._settle, params), exchange.group, exchange.micro_group
                )
                module.set_custom_reduce_scatter(scatter)
                handle.on_detach(partial(module.set_custom_reduce_scatter, DefaultReduceScatter()))

    def _settle(self, params: list[nn.Parameter], exchange: Exchange) -> None:
        if self.fresh:
            self.fresh = False
            self.handle.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.handle.settle(exchange, params, [exchange.group])

    def _finish(self) -> None:
        self.fresh = True
        self.handle.end()


def groups_of(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    return (
        list(state._fsdp_param_groups)
        if hasattr(state, "_fsdp_param_groups")
        else [g for g in [state._fsdp_param_group] if g]
    )


class FilteringReduceScatter(DefaultReduceScatter):
    """In place of the reduce-scatter: the same way in, Gram, decision. The shard of w^T G is where it belongs; no way out."""

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
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise TypeError("attach: FSDP2's gradient divide factor must be the default one; got another. "
                            "Leave set_gradient_divide_factor out: the accepted rows are averaged.")  # fmt: skip
        self.exchange.load(
            input_tensor, output_tensor, 1.0 if op == dist.ReduceOp.AVG else float(self.exchange.W)
        )
        self.settle(self.exchange)
        return None


class OneWay(Exchange):
    """An exchange whose update stays sliced: FSDP2's own layout."""

    def load(self, whole: Tensor, shard: Tensor, factor: float) -> None:
        """Args: whole: this rank's gradients of the group, (W c,). shard: for the update, (c,). factor: to multiply it by."""
        self.begin()
        self.shard, self.factor = shard, factor
        self._post(whole)

    def give_back(self, weights: Sequence[float]) -> None:
        combine(self.parcels[0].rows, [w * self.factor for w in weights], out=self.shard)

    def fill(self, value: float) -> None:
        self.shard.fill_(value)

    def end(self) -> None:
        self.begin()  # the memory is an unsharded gradient's: not to be kept
