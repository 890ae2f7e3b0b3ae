"""gaf.attach: one line turns a data-parallel job's averaging into agreement filtering."""

import gc
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakSet, ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from gaf.checks import check_optimizers
from gaf.ranks.attach_checks import (
    check_ddp,
    check_model,
    check_same_everywhere,
    check_scaler,
    check_shards,
    check_usable,
    check_whole,
)
from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.ranks.steps import parameters_of
from gaf.rules.contract import Policy, check_policy, scope_of


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy,
    *,
    scaler: GradScaler | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    micro_group: int = 1,
    shards: "dist.ProcessGroup | DeviceMesh | None" = None,
) -> Handle:
    """Filters a data-parallel model's gradients by agreement, exactly as published. The training loop stays as it is.

        model = DistributedDataParallel(model)
        handle = gaf.attach(model, optimizer, gaf.GAF(tau=0.97))

    Each rank's gradient is one row. After a skip `optimizer.step()` leaves parameters and its state bitwise as they
    were; `p.grad` is zero before that step and None after it. Gradients that a rank accumulates under `model.no_sync()`
    are its row. BatchNorm statistics are not taken back.

    Costs per rank and step: 2 n (W-1)/W coordinates sent, what a ring all-reduce sends, and k k scalars; one
    gradient-sized buffer, none between two ranks. The way in runs during the backward pass, the way out after it; a skip saves the way out.

    Args:
        model: a DistributedDataParallel model; or an FSDP2 model: sharded with `fully_shard` on the shard dimension of
            a mesh, with `group` the replicate dimension's (one decision, exact), or flat, with `GAF(scope="group")`
            (another algorithm: one decision for each parameter group).
        optimizer: any dense torch.optim optimizer over the model's parameters, or several; ZeroRedundancyOptimizer too.
        policy: `gaf.GAF(...)`, or any callable from a Gram matrix to a Decision that is the same on all ranks.
            `gaf.Mean()` is plain averaging bit for bit, `gaf.RandomSkip` the same with skips.
        scaler: the loop's GradScaler. An overflow on any rank makes the scale fall and nothing steps, as ever.
        group: the ranks whose rows are compared, a process group or a mesh of one dimension. DDP: its own group, the
            default. HSDP: the replicate group.
        micro_group: m consecutive ranks, m dividing W, whose plain average is one row: the micro-batch is then m
            ranks' batches, and k = W / m. A member that is not finite makes its row absent.
        shards: the ranks over which this model's coordinates are spread, as under tensor parallelism: each holds other
            parameters of the same replica. K is added up over them, so that all of them decide alike. Without it each
            shard decides for itself, and one may step where another skips. All of them must run their backward passes
            side by side. A parameter that every shard holds, such as a replicated norm's, counts once for each. HSDP's
            own shards need no mention.

    Returns:
        A Handle: `.last`, `.stats()`, `.gate(scheduler)`, `.state_dict()`, `.detach()`.

    Raises:
        TypeError, ValueError, RuntimeError: where something cannot work; the message says what to do instead.
    """
    model = unwrapped(model)
    optimizers = check_optimizers(optimizer, "attach")
    check_policy(policy, "attach")
    check_scaler(scaler)
    engine, compared = engine_of(model, policy, process_group(group, "group"))
    spread = process_group(shards, "shards")
    check_whole(micro_group)
    # First, so that no rank is left waiting by what another one alone has wrong.
    check_same_everywhere(model, policy, int(micro_group), compared, spread)
    exchange = exchange_over(compared, int(micro_group))
    check_shards(spread, compared, policy)
    check_model(model, optimizers, exchange)
    check = partial(check_usable, engine_scopes(model, policy), exchange.k)
    check(policy)
    params = engine.parameters(model)
    claim(model, params)
    handle = Handle(optimizers, policy, scaler, exchange.k, params, check)
    try:
        engine.install(model, handle, exchange, [] if spread is None else [spread])
    except BaseException:
        handle.detach()
        raise
    own(model, params, handle)
    return handle


def unwrapped(model: Any) -> Any:
    """The data-parallel model inside of torch.compile's wrapper, or of Lightning Fabric's."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "_forward_module", None)
    return inner if isinstance(inner, DistributedDataParallel) else model


def process_group(group: Any, name: str) -> Any:
    """The process group that is meant: None stays None, a mesh of one dimension gives its own."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"attach: {name} must be a process group, or a mesh of one dimension; got {group}. "
                f'Use {name}=mesh["replicate"], by the name of the dimension.'
            )
        return group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"attach: {name} must be a torch.distributed.ProcessGroup; got {group!r}. "
            'Use dist.new_group(ranks), or mesh["replicate"].get_group().'
        )
    return group


def engine_of(
    model: nn.Module, policy: Policy, group: "dist.ProcessGroup | None"
) -> tuple[Any, "dist.ProcessGroup"]:
    """The module that installs a handle in the model's engine, and the ranks whose rows are compared. Imported where they are used."""
    if isinstance(model, DistributedDataParallel):
        from gaf.ranks import ddp

        check_ddp(model, group)
        return ddp, model.process_group
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, nn.Module) and isinstance(model, FSDPModule):
        from gaf.ranks import fsdp

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a root stays whole after an evaluation
        return fsdp, ranks_of(model, policy, group)
    if isinstance(model, FullyShardedDataParallel):
        raise TypeError("attach: FullyShardedDataParallel (FSDP1) cannot be filtered; it reduces before anyone can look. "
                        "Use FSDP2: torch.distributed.fsdp.fully_shard.")  # fmt: skip
    raise TypeError(f"attach: the model must be data parallel, DistributedDataParallel or FSDP2's fully_shard; got {type(model).__name__}. "
                    "Wrap it before attaching. On one device use gaf.Accumulator(optimizer, policy).")  # fmt: skip


def ranks_of(
    model: nn.Module, policy: Policy, group: "dist.ProcessGroup | None"
) -> "dist.ProcessGroup":
    """Of an FSDP2 model: its replicas, or with scope="group" the ranks that it is sharded over."""
    mesh: Any = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
    if mesh is None:
        raise TypeError(
            f"attach: fully_shard must have sharded the model's parameters; those of {type(model).__name__} are whole. "
            "Call fully_shard(model, mesh=...) first."
        )
    if mesh.ndim != 1:
        raise TypeError(f"attach: fully_shard must be given the shard dimension of the mesh alone; the parameters are on {mesh}. "
                        'Use fully_shard(model, mesh=mesh["shard"]) and gaf.attach(..., group=mesh["replicate"].get_group()): '
                        "FSDP2's own all-reduce over the replicas would come before the decision. FSDP2 over a tensor-parallel model is "
                        "not supported; DistributedDataParallel with shards= is.")  # fmt: skip
    apart = scope_of(policy) == "group"
    if apart == (group is not None):
        raise TypeError('attach: an FSDP2 model needs either the replicas to compare, group=mesh["replicate"].get_group(), or '
                        'GAF(..., scope="group") for one decision per parameter group on a flat mesh, which is another algorithm; '
                        f"got {'both' if apart else 'neither'}. A flat mesh sums the ranks' gradients away before any one "
                        "decision about all of them could be taken.")  # fmt: skip
    return mesh.get_group() if group is None else group


def engine_scopes(model: nn.Module, policy: Policy) -> tuple[str, ...]:
    """The scopes that the model's engine can change between once it is attached."""
    if isinstance(model, DistributedDataParallel):
        return "all", "group"
    return (scope_of(policy),)


_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (its model, its handle), weakly


_handles: WeakSet[Handle] = WeakSet()


def claim(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Takes parameters over from handles whose model is gone.

    Raises:
        RuntimeError: where another handle decides on one of them.
    """
    for p in params:
        wrapper, handle = owner_of(p)
        if handle is None or not handle.attached:
            continue
        if is_alive(wrapper):
            raise RuntimeError(
                "attach: the model's parameters must not be attached already; they are, by an earlier gaf.attach. "
                "Call detach() on the handle that it returned, or delete the wrapper that it was called with."
            )
        handle.detach()


def owner_of(p: Tensor) -> tuple[Callable[[], Any], Handle | None]:
    wrapper, handle = _owners.get(p, (nothing, nothing))
    return wrapper, handle()


def nothing() -> None:
    return None


def own(model: nn.Module, params: Sequence[Tensor], handle: Handle) -> None:
    for p in params:
        _owners[p] = (ref(model), ref(handle))
    listen()
    _handles.add(handle)


@cache
def listen() -> None:
    register_optimizer_step_pre_hook(refuse_stranger)


def refuse_stranger(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before every step of any optimizer: one that attach was not given would move an attached model's parameters past a skip."""
    for handle in list(_handles):
        if not handle.attached or handle.knows(optimizer) or handle.stepping:
            continue  # a step within one that the handle knows is that one's
        p = next((p for p in parameters_of(optimizer) if p in handle.stale.params), None)
        if p is not None and not is_alive(owner_of(p)[0]):
            handle.detach()
        elif p is not None:
            raise RuntimeError(
                f"attach: every optimizer that steps on the model's parameters must be given to attach; a {type(optimizer).__name__} "
                "that was not is about to. Give attach the optimizer whose step() the loop calls, or all of them as a list; after "
                "making a new one, call handle.detach() and attach again."
            )


def is_alive(wrapper: Callable[[], Any]) -> bool:
    """Whether a model still exists, once cycles are collected: DDP and its hooks refer to each other."""
    if wrapper() is not None:
        gc.collect()
    return wrapper() is not None


def exchange_over(group: "dist.ProcessGroup", micro_group: int) -> Exchange:
    W = dist.get_world_size(group)
    if micro_group < 1 or W % micro_group:
        raise ValueError(
            f"attach: micro_group must be a whole number that divides the {W} ranks; got {micro_group}. "
            f"Use one of {[m for m in range(1, W + 1) if W % m == 0]}."
        )
    return Exchange(group, micro_group)
