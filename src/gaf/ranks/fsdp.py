"""FSDP2: when a backward pass begins, and one decision over a sharded model's replicas (HSDP)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gaf.ranks.exchange import Exchange
from gaf.ranks.fsdp_groups import GroupwiseShards
from gaf.ranks.handle import Handle
from gaf.rules.contract import scope_of


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that take part in the decision.

    Raises:
        ValueError: for a trainable parameter that is not sharded, and so not reduced.
    """
    named = list(model.named_parameters())
    for name, p in named:
        if not isinstance(p, DTensor) and p.requires_grad:
            raise ValueError(
                "attach: every trainable parameter must be sharded by fully_shard, which reduces "
                f"no other gradient; {name!r} is not (ignored_params). "
                "Leave ignored_params out, or freeze it."
            )
    return [p for _, p in named if isinstance(p, DTensor)]


def install_in_fsdp(
    model: nn.Module, handle: Handle, exchange: Exchange, shards: Sequence[dist.ProcessGroup]
) -> None:
    """Has the handle decide on the model's gradients.

    One decision covers all of it, over its replicas, or each parameter group, over its shards.
    """
    if scope_of(handle.policy) == "group":
        GroupwiseShards(handle, model, exchange)
        watch_passes(model, handle)
        return
    params = sharded_parameters(model)
    check_same_weights(params, exchange.group)
    groups = [params[0].device_mesh.get_group(), *shards]  # type: ignore[attr-defined]
    watch_passes(model, handle, Replicas(handle, exchange, params, groups).add_hooks)


def check_same_weights(params: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """FSDP2 does not make replicas equal at the start, as DistributedDataParallel does."""
    shards: list[Tensor] = [p.detach().to_local() for p in params]  # type: ignore[attr-defined]
    sums = torch.stack([shard.double().sum() for shard in shards])
    all_of = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of, sums, group=group)
    if not all(torch.equal(all_of[0].nan_to_num(), other.nan_to_num()) for other in all_of):
        raise ValueError(
            "attach: the replicas must start from the same weights; theirs differ. "
            "Seed the ranks alike before building the model, or load one checkpoint on all of them."
        )


def watch_passes(
    model: nn.Module, handle: Handle, begins: Callable[[], None] = lambda: None
) -> None:
    """Surveys the gradients when a pass begins, before FSDP2 adds to them outside of autograd.

    FSDP2 calls `_pre_backward` of one of its modules first, whichever forward method of it ran.
    The pass may be a torch.autograd.grad, which adds nothing. begins: called at the same time.
    """

    def survey_first(state: Any, grad: Tensor) -> Any:
        if not state._state_ctx.post_backward_final_callback_queued:
            handle.stale.survey()
            begins()
        return type(state)._pre_backward(state, grad)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._pre_backward = partial(survey_first, state)  # type: ignore[method-assign]
            handle.on_detach(partial(vars(state).pop, "_pre_backward"))


class Replicas:
    """Compares the replicas of a sharded model, on the shards of their gradients, after the pass.

    Each rank holds a shard; the ranks of `group` hold the same shard of different replicas. The
    Gram matrix is added up over the replicas' slices and then over the shards.

    Args:
        groups: those over which the coordinates are spread: FSDP2's own first.
    """

    def __init__(
        self,
        handle: Handle,
        exchange: Exchange,
        params: list[nn.Parameter],
        groups: Sequence[dist.ProcessGroup],
    ) -> None:
        self.handle, self.exchange, self.params = handle, exchange, params
        self.summed_groups = handle.summed_groups = [exchange.group, *groups]
        self.hooked: set[nn.Parameter] = set()
        self.reached: set[Tensor] = set()  # parameters whose gradient this pass has reduced
        self.due = -1  # the pass at whose end the decision is due
        self.add_hooks()

    def add_hooks(self) -> None:
        """Waits for the gradients of all trainable parameters, also those thawed after attach."""
        if len(self.hooked) == len(self.params):
            return
        for p in self.params:
            if p.requires_grad and p not in self.hooked:
                self.hooked.add(p)
                hook = p.register_post_accumulate_grad_hook(self._arrived)
                self.handle.on_detach(hook.remove)

    def _arrived(self, p: Tensor) -> None:
        """FSDP2 has reduced a gradient: decides when the whole backward pass is over."""
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
        self.handle.settle(self.exchange, used, self.summed_groups)
        self.handle.end()

    def _used_somewhere(self) -> list[nn.Parameter]:
        """Parameters that the pass has reached on any replica; the others stay as they are."""
        params = [p for p in self.params if p.requires_grad]
        device = params[0].to_local().device  # type: ignore[attr-defined]
        flags = torch.tensor([p in self.reached for p in params], dtype=torch.uint8, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.exchange.group)
        return [p for p, flag in zip(params, flags.tolist(), strict=True) if flag]
