"""FSDP2: the parameters that are decided on, when a backward pass begins, what decides."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gaf.ranks.exchange import Exchange
from gaf.ranks.fsdp_average import FlatAverage
from gaf.ranks.fsdp_groups import GroupwiseShards, fsdp_modules, grouped_parameters
from gaf.ranks.handle import Handle
from gaf.ranks.replicas import Replicas
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
    reduced = [group for module in fsdp_modules(model) for group in grouped_parameters(module)]
    replicas = Replicas(handle, exchange, params, reduced, groups)
    watch_passes(model, handle, replicas.begin, replicas.end)


def install_average(
    model: nn.Module, handle: Handle, exchange: Exchange, shards: Sequence[dist.ProcessGroup]
) -> None:
    """Has the handle follow a flat model's gradients, which FSDP2 averages by itself."""
    sharded_parameters(model)
    average = FlatAverage(handle, fsdp_modules(model), exchange)
    watch_passes(model, handle, average.begin, average.end)


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
    model: nn.Module,
    handle: Handle,
    begin: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
) -> None:
    """Surveys the gradients when a pass begins, before FSDP2 adds to them outside of autograd.

    FSDP2 calls `_pre_backward` of one of its modules first, whichever forward method of it ran.

    Args:
        model: whose passes.
        handle: surveys the gradients.
        begin: called after the survey. The pass may be a torch.autograd.grad, which adds nothing.
        end: called at the end of the pass, after what FSDP2 does then.
    """
    states = list(dict.fromkeys(module._get_fsdp_state() for module in fsdp_modules(model)))

    def pre_backward(state: Any, grad: Tensor) -> Any:
        first = not in_pass(states)
        if first:
            handle.stale.survey()
            begin()
        result = type(state)._pre_backward(state, grad)
        if first:
            at_end_of_pass(partial(end_pass, states, end))
        return result

    for state in states:
        state._pre_backward = partial(pre_backward, state)  # type: ignore[method-assign]
        handle.on_detach(partial(vars(state).pop, "_pre_backward"))


def in_pass(states: Sequence[Any]) -> bool:
    """Whether FSDP2 is in a backward pass: it keeps account for each module that is called."""
    return any(state._state_ctx.post_backward_final_callback_queued for state in states)


def end_pass(states: Sequence[Any], end: Callable[[], None]) -> None:
    """Lets FSDP2 end the pass of each module that was called, the last of which it queued later."""
    at_end_of_pass(end) if in_pass(states) else end()


def at_end_of_pass(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
