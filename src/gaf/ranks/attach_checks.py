"""What gaf.attach refuses, each with the way out."""

import warnings
from collections import Counter
from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gaf.ranks.exchange import Exchange
from gaf.record.telemetry import frames_inside
from gaf.rules.contract import Policy, min_accepted_of, scope_of


def check_scaler(scaler: Any) -> None:
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"attach: scaler must be a torch.amp.GradScaler or None; got {type(scaler).__name__}. "
            "Pass the scaler of the training loop, or leave it out."
        )


def check_usable(scopes: tuple[str, ...], k: int, policy: Policy) -> None:
    """What a policy of this model must be, at attach and later."""
    scope = scope_of(policy)
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
    if scope_of(policy) == "group":
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


def check_whole(micro_group: Any) -> None:
    if not isinstance(micro_group, Integral) or isinstance(micro_group, bool):
        raise TypeError(
            f"attach: micro_group must be a whole number of ranks; got {micro_group!r}. Use 1 for a row from each rank."
        )


def check_ddp(model: DistributedDataParallel, group: "dist.ProcessGroup | None") -> None:
    from gaf.ranks import ddp

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
    least = min_accepted_of(policy)
    if 1 < k < least:
        raise ValueError(f"attach: the policy's min_accepted must be at most the number of rows, for no step could be taken; got {least} "
                         f"and {k} rows. Lower min_accepted, or start more ranks.")  # fmt: skip
    if k == 1:
        warnings.warn("gaf: there is one row only, and it has nothing to agree with: every step is taken as in plain training.",
                      stacklevel=frames_inside() + 1)  # fmt: skip
