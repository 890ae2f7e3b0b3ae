"""What all ranks must have in common before any of them sends: otherwise they deadlock."""

from collections import Counter
from functools import partial

import torch.distributed as dist
from torch import nn

from gaf.ranks.names import gather_objects
from gaf.rules.contract import Policy


def check_same_everywhere(
    model: nn.Module,
    policy: Policy,
    micro_group: int,
    group: "dist.ProcessGroup",
    shards: "dist.ProcessGroup | None",
) -> None:
    """Ranks that cut or judge their gradients differently would hang, or drift apart."""
    shapes = [
        f"{name} {tuple(p.shape)} {p.dtype} trainable={p.requires_grad}"
        for name, p in model.named_parameters()
    ]
    rule = {"policy": describe_policy(policy), "micro_group": str(micro_group)}
    check_same(rule | {"parameters": "; ".join(shapes)}, group)
    if shards is not None:
        check_same(rule, shards)


def check_same(mine: dict[str, str], group: "dist.ProcessGroup", subject: str = "attach") -> None:
    """ValueError on all ranks where one differs from the others. subject: of the message."""
    all_of = gather_objects(mine, group)
    for what in mine:
        found = [other[what] for other in all_of]
        if len(set(found)) > 1:
            usual = Counter(found).most_common(1)[0][0]
            odd = next(r for r, value in enumerate(found) if value != usual)
            a, b = first_difference(usual, found[odd])
            raise ValueError(
                f"{subject}: all ranks must have the same {what}; rank {odd} of the group has {b}, "
                f"others {a}. Make it alike on all of them."
            )


def describe_policy(policy: Policy) -> str:
    """A policy's repr, if it shows what the policy does rather than where it lies in memory.

    Otherwise its class and its real numbers: whole ones and flags may be a rank's own.
    """
    if isinstance(policy, partial):
        given = [*map(repr, policy.args), *(f"{k}={v!r}" for k, v in policy.keywords.items())]
        return f"partial({', '.join([describe_policy(policy.func), *given])})"
    if "object at 0x" not in repr(policy) and not hasattr(policy, "__qualname__"):
        return repr(policy)
    if hasattr(policy, "__qualname__"):
        return str(policy.__qualname__)
    own = getattr(policy, "__dict__", {})
    limits = [f"{name}={value!r}" for name, value in own.items() if isinstance(value, float)]
    return f"{type(policy).__qualname__}({', '.join(limits)})"


def first_difference(a: str, b: str) -> tuple[str, str]:
    ours, theirs = a.split("; "), b.split("; ")
    for x, y in zip(ours, theirs, strict=False):
        if x != y:
            return x, y
    return f"{len(ours)} of them", f"{len(theirs)} of them"
