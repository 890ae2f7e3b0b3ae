"""FSDP2: one decision over replicas of a sharded model (HSDP), or one for each parameter group of a flat one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.rules.combine import combine_into
from gaf.rules.contract import scope_of

Groups = Sequence[dist.ProcessGroup]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that take part in the decision.

    Raises:
        ValueError: where a trainable parameter is not sharded, and so not reduced.
    """
    named = list(model.named_parameters())
    for name, p in named:
        if not isinstance(p, DTensor) and p.requires_grad:
            raise ValueError(
                "attach: every trainable parameter must be sharded by fully_shard, for it reduces no other gradient; "
                f"{name!r} is not (ignored_params). Leave ignored_params out, or freeze it."
            )
    return [p for _, p in named if isinstance(p, DTensor)]


def install(model: nn.Module, handle: Handle, exchange: Exchange, shards: Groups) -> None:
    """Has the handle decide on the model's gradients: of all of it over its replicas, or of each group over its shards."""
    params = parameters(model)
    if scope_of(handle.policy) == "group":
        GroupwiseShards(handle, model, exchange)
        watch(model, handle)
    else:
        check_same_weights(params, exchange.group)
        over = [params[0].device_mesh.get_group(), *shards]  # type: ignore[attr-defined]
        watch(model, handle, Replicas(handle, exchange, params, over).listen)


def check_same_weights(params: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """FSDP2 does not make replicas equal at the start, as DistributedDataParallel does."""
    sums = torch.stack([p.detach().to_local().double().sum() for p in params])  # type: ignore[attr-defined]
    all_of = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of, sums, group=group)
    if not all(torch.equal(all_of[0].nan_to_num(), other.nan_to_num()) for other in all_of):
        raise ValueError("attach: the replicas must start from the same weights; theirs differ. Seed the ranks alike before building the "
                         "model, or load one checkpoint on all of them.")  # fmt: skip


def watch(model: nn.Module, handle: Handle, begins: Callable[[], None] = lambda: None) -> None:
    """Surveys the gradients whenever a backward pass begins, before FSDP2 adds to them outside of autograd.

    FSDP2 calls `_pre_backward` of one of its modules first, whichever forward method of it ran. The survey may be of a
    torch.autograd.grad, which adds nothing. begins: called at the same time.
    """

    def surveying(state: Any, grad: Tensor) -> Any:
        if not state._state_ctx.post_backward_final_callback_queued:
            handle.stale.survey()
            begins()
        return type(state)._pre_backward(state, grad)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._pre_backward = partial(surveying, state)  # type: ignore[method-assign]
            handle.on_detach(partial(vars(state).pop, "_pre_backward"))


class Replicas:
    """Compares the replicas of a sharded model, on the shards of their gradients, once the backward pass is over.

    Each rank holds a shard; the ranks of `group` hold the same shard of different replicas. The Gram matrix is added up
    over the replicas' slices and then over the shards.

    Args:
        over: the groups over which the coordinates are spread: FSDP2's own first.
    """

    def __init__(
        self, handle: Handle, exchange: Exchange, params: list[nn.Parameter], over: Groups
    ) -> None:
        self.handle, self.exchange, self.params = handle, exchange, params
        self.over = handle.over = [exchange.group, *over]
        self.heard: set[nn.Parameter] = set()
        self.reached: set[Tensor] = set()  # parameters whose gradient this pass has reduced
        self.due = -1  # the pass at whose end the decision is due
        self.listen()

    def listen(self) -> None:
        """Waits for the gradients of all trainable parameters, of those too that were thawed after attach."""
        for p in self.params if len(self.heard) < len(self.params) else ():
            if p.requires_grad and p not in self.heard:
                self.heard.add(p)
                hook = p.register_post_accumulate_grad_hook(self._arrived)
                self.handle.on_detach(hook.remove)

    def _arrived(self, p: Tensor) -> None:
        """FSDP2 has reduced a gradient: have the rest done when the whole backward pass is over."""
        if self.due != torch._C._current_graph_task_id():
            self.due = torch._C._current_graph_task_id()
            self.reached = set()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.reached.add(p)

    @torch.no_grad()
    def _finish(self) -> None:
        self.due = -1
        used = self._used_somewhere()
        self.handle.stale.reach(used)
        self.handle.begin()
        self.exchange.begin()
        for p in used:
            if p not in self.reached:
                p.grad = torch.zeros_like(p)
            grad: Any = p.grad
            self.exchange.send(grad.to_local().view(-1))
        self.handle.settle(self.exchange, used, self.over)
        self.handle.end()

    def _used_somewhere(self) -> list[nn.Parameter]:
        """Parameters that the pass has reached on any replica; the others stay as they are, and without a step."""
        params = [p for p in self.params if p.requires_grad]
        device = params[0].to_local().device  # type: ignore[attr-defined]
        flags = torch.tensor([p in self.reached for p in params], dtype=torch.uint8, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.exchange.group)
        return [p for p, flag in zip(params, flags.tolist(), strict=True) if flag]


class GroupwiseShards:
    """scope="group" on a flat FSDP2 model: each parameter group decides for itself where its gradients are reduced."""

    def __init__(self, handle: Handle, model: nn.Module, exchange: Exchange) -> None:
        self.handle = handle
        handle.over = [exchange.group]
        self.current = -1  # the pass that is in progress
        for module in model.modules():
            if isinstance(module, FSDPModule):
                params = [p.sharded_param for group in groups_of(module) for p in group.fsdp_params]
                scatter = FilteringReduceScatter(
                    partial(self._settle, params), exchange.group, exchange.micro_group
                )
                module.set_custom_reduce_scatter(scatter)
                handle.on_detach(partial(module.set_custom_reduce_scatter, DefaultReduceScatter()))

    def _settle(self, params: list[nn.Parameter], exchange: Exchange) -> None:
        self.handle.stale.reach(params)
        if self.current != torch._C._current_graph_task_id():
            self.current = torch._C._current_graph_task_id()
            self.handle.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self.handle.end)
        self.handle.settle(exchange, params, [exchange.group])


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

    shard: Tensor
    factor: float

    def load(self, whole: Tensor, shard: Tensor, factor: float) -> None:
        """Args: whole: this rank's gradients of the group, (W c,). shard: for the update, (c,). factor: to multiply it by."""
        self.begin()
        self.shard, self.factor = shard, factor
        self._post(whole)

    def give_back(self, weights: Sequence[float]) -> None:
        combine_into(self.shard, self.parcels[0].rows, [w * self.factor for w in weights])

    def fill(self, value: float) -> None:
        self.shard.fill_(value)

    def end(self) -> None:
        self.begin()  # the memory is an unsharded gradient's: not to be kept
