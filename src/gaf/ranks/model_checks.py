"""Models that gaf.attach refuses, each with the way out."""

from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gaf.ranks.exchange import Exchange
from gaf.ranks.optimizer_steps import parameters_of
from gaf.rules.averaging import averages
from gaf.rules.contract import Policy, is_planned, scope_of


def check_ddp(
    model: DistributedDataParallel, group: "dist.ProcessGroup | None", other_hook: bool
) -> None:
    """other_hook: whether the model has a communication hook that attach has not made."""
    if group is not None and group is not model.process_group:
        raise ValueError(
            "attach: under DistributedDataParallel group must be the model's own process group; "
            "got another. Leave it out, or give the group to "
            "DistributedDataParallel(process_group=...)."
        )
    if other_hook:
        raise RuntimeError(
            "attach: the model must have no other communication hook; it has "
            f"{model._comm_hooks[0][0].__qualname__}, and DistributedDataParallel takes one. "
            "Wrap the model anew without it."
        )
    if getattr(model, "mixed_precision", None) is not None:
        raise TypeError(
            "attach: DistributedDataParallel(mixed_precision=...) has a hook of its own that "
            "excludes another; it is on. Use torch.autocast."
        )
    if getattr(model, "_use_python_reducer", False):
        raise TypeError(
            "attach: the Python reducer (torch._dynamo.config.optimize_ddp = "
            '"python_reducer") has no hooks; it is on. Leave optimize_ddp at True.'
        )
    if getattr(model, "_delay_all_reduce_params", None):
        raise TypeError(
            "attach: every gradient must pass through the hook; delay_all_reduce_named_params "
            "keeps some from it. Leave it out."
        )


def check_fsdp_mesh(model: nn.Module, mesh: Any) -> None:
    """mesh: that the model's parameters are sharded over; None if they are not."""
    if mesh is None:
        raise TypeError(
            "attach: fully_shard must have sharded the model's parameters; those of "
            f"{type(model).__name__} are whole. Call fully_shard(model, mesh=...) first."
        )
    if mesh.ndim != 1:
        raise TypeError(
            "attach: fully_shard must be given the shard dimension of the mesh alone; the "
            f"parameters are on {mesh}. "
            'Use fully_shard(model, mesh=mesh["shard"]) and '
            'gaf.attach(..., group=mesh["replicate"].get_group()): '
            "FSDP2's own all-reduce over the replicas would come before the decision. "
            "FSDP2 over a tensor-parallel model is not supported; DistributedDataParallel with "
            "shards= is."
        )


def check_fsdp_group(
    policy: Policy, group: "dist.ProcessGroup | None", unsharded: bool = False
) -> None:
    """Rows are replicas, or kept unsharded, or decided on by parameter groups, or averaged."""
    if group is None and averages(policy) and not is_planned(policy):
        return
    groupwise = scope_of(policy) == "group"
    chosen = groupwise + (group is not None) + unsharded
    if chosen != 1:
        raise TypeError(
            "attach: an FSDP2 model needs either the replicas to compare, "
            'group=mesh["replicate"].get_group(); or on a flat mesh unsharded=True, for one '
            "decision at the memory of an unsharded gradient per rank; or on a flat mesh "
            'GAF(..., scope="group"), for one decision per parameter group, which is another '
            "algorithm; or on a flat mesh gaf.Mean; "
            f"got {('neither', '', 'two', 'all')[chosen]}. Without them a flat mesh "
            "sums the ranks' gradients away before they could be compared."
        )


def check_not_unsharded(unsharded: bool) -> None:
    if unsharded:
        raise TypeError(
            "attach: unsharded=True is for a flat FSDP2 model; got DistributedDataParallel, whose "
            "gradients are whole. Leave it out."
        )


def raise_not_parallel(model: Any) -> NoReturn:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        raise TypeError(
            "attach: FullyShardedDataParallel (FSDP1) cannot be filtered; it reduces gradients "
            "before they can be compared. Use FSDP2: torch.distributed.fsdp.fully_shard."
        )
    raise TypeError(
        "attach: the model must be data parallel, DistributedDataParallel or FSDP2's fully_shard; "
        f"got {type(model).__name__}. Wrap it before attaching. "
        "On one device use gaf.Accumulator(optimizer, policy)."
    )


def check_attached_model(model: nn.Module, optimizers: list[Optimizer], exchange: Exchange) -> None:
    """Refuses what makes rows depend on each other, escape the decision, or step before it."""
    for optimizer in optimizers:
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise TypeError(
                "attach: ZeroRedundancyOptimizer(overlap_with_ddp=True) steps during the backward "
                "pass, before the decision. Use overlap_with_ddp=False."
            )
    optimized = {p for optimizer in optimizers for p in parameters_of(optimizer)}
    for name, p in model.named_parameters():
        check_attached_parameter(name, p, p in optimized)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise TypeError(
                f"attach: gradients must be dense; {name!r} is sparse. "
                "Use nn.Embedding(..., sparse=False)."
            )
        if isinstance(module, nn.SyncBatchNorm) and not within_micro_group(module, exchange):
            raise TypeError(
                "attach: rows must come from separate micro-batches; SyncBatchNorm "
                f"{name!r} mixes those of its ranks. Use BatchNorm, or process groups of the ranks "
                "of one micro_group."
            )


def check_attached_parameter(name: str, p: nn.Parameter, optimized: bool) -> None:
    """optimized: whether one of the optimizers holds it."""
    if hasattr(p, "_in_backward_optimizers"):
        raise TypeError(
            f"attach: the optimizer must step after the backward pass; that of {name!r} was "
            "applied in it (apply_optimizer_in_backward). Use an ordinary optimizer."
        )
    if p.is_complex():
        raise TypeError(
            f"attach: parameters must be real; {name!r} is {p.dtype}. Use torch.view_as_real."
        )
    if p.requires_grad and not optimized:
        raise ValueError(
            "attach: the optimizers must hold every trainable parameter of the model, because each "
            f"takes part in the decision; {name!r} is in none of them. "
            "Give all optimizers as a list, or freeze it with requires_grad_(False) before "
            "wrapping."
        )


def within_micro_group(norm: nn.SyncBatchNorm, exchange: Exchange) -> bool:
    """Whether all ranks whose batches a SyncBatchNorm mixes belong to one row."""
    group = dist.group.WORLD if norm.process_group is None else norm.process_group
    compared = dist.get_process_group_ranks(exchange.group)
    ranks = dist.get_process_group_ranks(group)
    if not set(ranks) <= set(compared):
        return False
    return len({compared.index(r) // exchange.micro_group for r in ranks}) == 1


def raise_thawed(name: str) -> NoReturn:
    raise ValueError(
        "attach: every trainable parameter must have been trainable when DistributedDataParallel "
        f"was made, which averages no other; {name!r} was frozen then. "
        "Wrap the model again, then attach."
    )
