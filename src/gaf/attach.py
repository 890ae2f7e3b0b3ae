"""gaf.attach: one line turns a data-parallel job's averaging into agreement filtering."""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any
from weakref import ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from gaf.checks import check_optimizers, check_policy
from gaf.combine import Policy
from gaf.exchange import Exchange
from gaf.handle import Handle
from gaf.telemetry import frames_inside


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
    engine.install(model, handle, exchange, [] if spread is None else [spread])
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


def check_scaler(scaler: Any) -> None:
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"attach: scaler must be a torch.amp.GradScaler or None; got {type(scaler).__name__}. "
            "Pass the scaler of the training loop, or leave it out."
        )


def engine_of(
    model: nn.Module, policy: Policy, group: "dist.ProcessGroup | None"
) -> tuple[Any, "dist.ProcessGroup"]:
    """The module that installs a handle in the model's engine, and the ranks whose rows are compared. Imported where they are used."""
    if isinstance(model, DistributedDataParallel):
        from gaf import ddp

        check_ddp(model, group)
        return ddp, model.process_group
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, nn.Module) and isinstance(model, FSDPModule):
        from gaf import fsdp

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
                        "FSDP2's own all-reduce over the replicas would come before the decision.")  # fmt: skip
    apart = getattr(policy, "scope", "all") == "group"
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
    return (getattr(policy, "scope", "all"),)


def check_usable(scopes: tuple[str, ...], k: int, policy: Policy) -> None:
    """What a policy of this model must be, at attach and later."""
    scope = getattr(policy, "scope", "all")
    if scope == "layer":
        raise ValueError("attach: the policy's scope must be 'all' or 'group'; got 'layer', which gaf.Accumulator has on one device. Use "
                         "'group' for a decision per bucket or parameter group, or leave scope out.")  # fmt: skip
    if scope not in scopes:
        raise ValueError(
            f"handle.policy: an FSDP2 model's policy must keep the scope {scopes[0]!r} that it was attached with; "
            f"got {scope!r}. Call detach() and attach again with the other scope."
        )
    check_k(k, policy)


def check_shards(shards: Any, group: "dist.ProcessGroup", policy: Policy) -> None:
    if shards is None:
        return
    if getattr(policy, "scope", "all") == "group":
        raise ValueError(
            "attach: with shards the policy's scope must be 'all', for the shards' buckets hold other parameters; "
            "got 'group'. Leave scope out."
        )
    both = set(dist.get_process_group_ranks(shards)) & set(dist.get_process_group_ranks(group))
    if both != {dist.get_rank()}:
        raise ValueError(
            "attach: shards must have this rank alone in common with the ranks whose rows are compared; "
            f"they share ranks {sorted(both)}. Use the other dimension of the mesh."
        )


_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (its model, its handle), weakly


def claim(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Takes parameters over from handles whose model is gone.

    Raises:
        RuntimeError: where another handle decides on one of them.
    """
    for p in params:
        wrapper, handle = owner_of(p)
        if handle is None or not handle.attached:
            continue
        if wrapper() is not None:
            gc.collect()  # DDP and its hooks refer to each other
        if wrapper() is not None:
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


def check_whole(micro_group: Any) -> None:
    if not isinstance(micro_group, Integral) or isinstance(micro_group, bool):
        raise TypeError(
            f"attach: micro_group must be a whole number of ranks; got {micro_group!r}. Use 1 for a row from each rank."
        )


def exchange_over(group: "dist.ProcessGroup", micro_group: int) -> Exchange:
    W = dist.get_world_size(group)
    if micro_group < 1 or W % micro_group:
        raise ValueError(
            f"attach: micro_group must be a whole number that divides the {W} ranks; got {micro_group}. "
            f"Use one of {[m for m in range(1, W + 1) if W % m == 0]}."
        )
    return Exchange(group, micro_group)


def check_ddp(model: DistributedDataParallel, group: "dist.ProcessGroup | None") -> None:
    from gaf import ddp

    if group is not None and group is not model.process_group:
        raise ValueError("attach: under DistributedDataParallel group must be the model's own process group; got another. Leave it out, "
                         "or give the group to DistributedDataParallel(process_group=...).")  # fmt: skip
    if ddp.has_other_hook(model):
        raise RuntimeError(f"attach: the model must have no other communication hook; it has {model._comm_hooks[0][0].__qualname__}, and "
                           "DistributedDataParallel takes one. Wrap the model anew without it.")  # fmt: skip
    if getattr(model, "mixed_precision", None) is not None:
        raise TypeError("attach: DistributedDataParallel(mixed_precision=...) has a hook of its own that excludes another; it is on. "
                        "Use torch.autocast.")  # fmt: skip
    if getattr(model, "_use_python_reducer", False):
        raise TypeError('attach: the Python reducer (torch._dynamo.config.optimize_ddp = "python_reducer") has no hooks; it is on. '
                        "Leave optimize_ddp at True.")  # fmt: skip
    if getattr(model, "_delay_all_reduce_params", None):
        raise TypeError(
            "attach: every gradient must pass through the hook; delay_all_reduce_named_params keeps some from it. Leave it out."
        )


def check_model(model: nn.Module, optimizers: list[Optimizer], exchange: Exchange) -> None:
    """What would make rows depend on each other, escape the decision, or be stepped on before it."""
    held = {
        p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for optimizer in optimizers:
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise TypeError("attach: ZeroRedundancyOptimizer(overlap_with_ddp=True) steps during the backward pass, before the decision. "
                            "Use overlap_with_ddp=False.")  # fmt: skip
    for name, p in model.named_parameters():
        if hasattr(p, "_in_backward_optimizers"):
            raise TypeError(f"attach: the optimizer must step after the backward pass; that of {name!r} was applied in it "
                            "(apply_optimizer_in_backward). Use an ordinary optimizer.")  # fmt: skip
        if p.is_complex():
            raise TypeError(
                f"attach: parameters must be real; {name!r} is {p.dtype}. Use torch.view_as_real."
            )
        if p.requires_grad and p not in held:
            raise ValueError(f"attach: the optimizers must hold every trainable parameter of the model, for each takes part in the "
                             f"decision; {name!r} is in none of them. Give all optimizers as a list, or freeze it with "
                             "requires_grad_(False) before wrapping.")  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise TypeError(
                f"attach: gradients must be dense; {name!r} is sparse. Use nn.Embedding(..., sparse=False)."
            )
        if isinstance(module, nn.SyncBatchNorm) and not within_micro_group(module, exchange):
            raise TypeError(f"attach: rows must come from separate micro-batches; SyncBatchNorm {name!r} mixes those of its ranks. Use "
                            "BatchNorm, or process groups of the ranks of one micro_group.")  # fmt: skip


def within_micro_group(norm: nn.SyncBatchNorm, exchange: Exchange) -> bool:
    ranks = dist.get_process_group_ranks(
        norm.process_group if norm.process_group is not None else dist.group.WORLD
    )
    here = dist.get_process_group_ranks(exchange.group)
    return (
        all(r in here for r in ranks)
        and len({here.index(r) // exchange.micro_group for r in ranks}) == 1
    )


def check_same_everywhere(
    model: nn.Module,
    policy: Policy,
    micro_group: int,
    group: "dist.ProcessGroup",
    shards: "dist.ProcessGroup | None",
) -> None:
    """Ranks that would cut or judge their gradients differently would wait for each other, or drift apart."""
    shapes = [
        f"{name} {tuple(p.shape)} {p.dtype} trainable={p.requires_grad}"
        for name, p in model.named_parameters()
    ]
    rule = {"policy": described(policy), "micro_group": str(micro_group)}
    check_same(rule | {"parameters": "; ".join(shapes)}, group)
    if shards is not None:
        check_same(rule, shards)


def check_same(mine: dict[str, str], group: "dist.ProcessGroup") -> None:
    all_of: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_of, mine, group=group)
    for what in mine:
        found = [other[what] for other in all_of]
        if len(set(found)) > 1:
            usual = Counter(found).most_common(1)[0][0]
            odd = next(r for r, value in enumerate(found) if value != usual)
            a, b = first_difference(usual, found[odd])
            raise ValueError(
                f"attach: all ranks must have the same {what}; rank {odd} of the group has {b}, others {a}. "
                "Build the model and the policy alike on all of them."
            )


def described(policy: Policy) -> str:
    """A policy's repr, where it says what the policy does rather than where it lies in memory."""
    own = "object at 0x" not in repr(policy) and not hasattr(policy, "__qualname__")
    return repr(policy) if own else str(getattr(policy, "__qualname__", type(policy).__qualname__))


def first_difference(a: str, b: str) -> tuple[str, str]:
    pairs = [(x, y) for x, y in zip(a.split("; "), b.split("; "), strict=False) if x != y]
    return pairs[0] if pairs else (f"{len(a.split('; '))} of them", f"{len(b.split('; '))} of them")


def check_k(k: int, policy: Policy) -> None:
    least = getattr(policy, "min_accepted", 1)
    if 1 < k < least:
        raise ValueError(f"attach: the policy's min_accepted must be at most the number of rows, for no step could be taken; got {least} "
                         f"and {k} rows. Lower min_accepted, or start more ranks.")  # fmt: skip
    if k == 1:
        warnings.warn("gaf: there is one row only, and it has nothing to agree with: every step is taken as in plain training.",
                      stacklevel=frames_inside() + 1)  # fmt: skip
