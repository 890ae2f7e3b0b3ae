"""Arguments that gaf.attach refuses, each with the way out."""

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch.amp import GradScaler
from torch.optim import Optimizer

from gaf.record.hints import frames_inside
from gaf.rules.averaging import averages, measures
from gaf.rules.contract import Policy, argument_of_least, is_planned, min_accepted_of, scope_of
from gaf.rules.second_moments import check_metric, check_no_optimizer_metric


def check_scaler(scaler: Any) -> None:
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"attach: scaler must be a torch.amp.GradScaler or None; got {type(scaler).__name__}. "
            "Pass the scaler of the training loop, or leave it out."
        )


def check_usable(
    engine: Any, exchange: Any, optimizers: Sequence[Optimizer], policy: Policy
) -> None:
    """What a policy of this model must be, at attach and later.

    Args:
        engine: the model's, for the scopes that it allows.
        exchange: for its rows.
        optimizers: for their metric.
        policy: the user's.
    """
    if exchange.micro_group > 1 and measures(policy):
        raise ValueError(
            "attach: with micro_group above 1 measure_every must be 0, because an all-reduce shows "
            f"ranks and not their averages; got {policy!r} and micro_group={exchange.micro_group}. "
            "Leave micro_group out: the ranks are measured."
        )
    if engine.averages_only and (not averages(policy) or is_planned(policy)):
        raise ValueError(
            "handle.policy: a flat FSDP2 model that was attached with gaf.Mean must keep it, "
            f"because its gradients are reduced before a decision; got {policy!r}. "
            "Call detach() and attach again."
        )
    scope = scope_of(policy)
    if scope == "layer":
        raise ValueError(
            "attach: the policy's scope must be 'all' or 'group'; got 'layer', which "
            "gaf.Accumulator has on one device. Use 'group' for a decision per bucket or parameter "
            "group, or leave scope out."
        )
    if scope not in engine.scopes:
        raise ValueError(
            "handle.policy: an FSDP2 model's policy must keep the scope "
            f"{engine.scopes[0]!r} that it was attached with; got {scope!r}. "
            "Call detach() and attach again with the other scope."
        )
    check_metric(policy, optimizers, "attach")
    if scope == "group":
        each = "each bucket or parameter group decides while the others are on their way"
        check_no_optimizer_metric(policy, "attach", each)
    check_row_count(exchange.k, policy)


def check_row_count(k: int, policy: Policy) -> None:
    least = min_accepted_of(policy)
    if 1 < k < least:
        raise ValueError(
            "attach: the policy must need no more rows than there are, or no step could be taken; "
            f"{policy!r} needs {least}, and there are {k}. Lower {argument_of_least(policy)}, or "
            "start more ranks."
        )
    if k == 1:
        warnings.warn(
            "gaf: there is one row only, and it has nothing to agree with: every step is taken as "
            "in plain training.",
            stacklevel=frames_inside() + 1,
        )


def check_micro_group(micro_group: Any, subject: str = "attach") -> None:
    if not isinstance(micro_group, Integral) or isinstance(micro_group, bool):
        raise TypeError(
            f"{subject}: micro_group must be a whole number of ranks; got {micro_group!r}. "
            "Use 1 for a row from each rank."
        )


def check_divides(micro_group: int, group: "dist.ProcessGroup", subject: str = "attach") -> None:
    W = dist.get_world_size(group)
    if micro_group < 1 or W % micro_group:
        raise ValueError(
            f"{subject}: micro_group must be a whole number that divides the {W} ranks; "
            f"got {micro_group}. Use one of {[m for m in range(1, W + 1) if W % m == 0]}."
        )


def check_shards(shards: Any, group: "dist.ProcessGroup", policy: Policy) -> None:
    if shards is None:
        return
    if scope_of(policy) == "group":
        raise ValueError(
            "attach: with shards the policy's scope must be 'all', because the shards' buckets "
            "hold other parameters; got 'group'. Leave scope out."
        )
    both = set(dist.get_process_group_ranks(shards)) & set(dist.get_process_group_ranks(group))
    if both != {dist.get_rank()}:
        raise ValueError(
            "attach: shards must have this rank alone in common with the ranks whose rows are "
            f"compared; they share ranks {sorted(both)}. Use the other dimension of the mesh."
        )


def check_mesh(mesh: Any, name: str, subject: str) -> None:
    if mesh.ndim != 1:
        raise ValueError(
            f"{subject}: {name} must be a process group, or a mesh of one dimension; got {mesh}. "
            f'Use {name}=mesh["replicate"], by the name of the dimension.'
        )


def check_group(group: Any, name: str, subject: str) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{subject}: {name} must be a torch.distributed.ProcessGroup; got {group!r}. "
            'Use dist.new_group(ranks), or mesh["replicate"].get_group().'
        )
