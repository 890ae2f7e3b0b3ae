"""gaf.all_reduce: any tensors, in place, outside of any model."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gaf.ranks.attach_checks import check_divides, check_micro_group
from gaf.ranks.engines import process_group
from gaf.ranks.exchange import Exchange
from gaf.ranks.messages import add_in_rank_order, device_of, kinds_of_devices
from gaf.ranks.names import gather_objects
from gaf.ranks.same_everywhere import check_same, describe_policy
from gaf.rules.contract import Policy, check_policy, merge_of
from gaf.rules.decision import Decision, check_weights
from gaf.rules.judging import decide_with_evidence
from gaf.rules.second_moments import check_no_optimizer_metric

HERE = "all_reduce"


@torch.no_grad()
def all_reduce(
    tensors: Sequence[Tensor],
    policy: Policy,
    *,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    micro_group: int = 1,
) -> Decision:
    """Replaces tensors by what a policy makes of all ranks' tensors, the same on every rank.

        deltas = [p.detach() - old for p, old in zip(model.parameters(), before)]
        decision = gaf.all_reduce(deltas, gaf.Median())
        if decision.stepped: ...

    The tensors of a rank, taken together, are one row: pseudo-gradients of local SGD or DiLoCo, an
    update of a federated round, the gradients of a loop of your own. After a skip they are zeros,
    on every rank. `gaf.Mean()` is a plain average, but not bit for bit dist.all_reduce's.

    It sends what a ring all-reduce of the tensors sends, k k scalars, and one number by which the
    ranks check that they called alike; it needs memory for the tensors once more.

    Args:
        tensors: any number of them, of floating-point types and any strides, on one device.
        policy: as for `gaf.attach`. It is used as it is and not copied: what it learns, it learns
            from call to call. Ranks that join late must load its state.
        group: the ranks, a process group or a mesh of one dimension; all of them by default. It may
            differ from call to call. A single rank is a row by itself.
        micro_group: m consecutive ranks, m dividing the number of ranks, whose plain average is one
            row.

    Returns:
        The Decision, on the CPU, the same on every rank.

    Raises:
        TypeError, ValueError, RuntimeError: on all ranks, if one of them gave what cannot work, or
            if shapes, types, policy or micro_group differ between ranks.
    """
    ranks = group_of(group)
    given = list(tensors) if isinstance(tensors, list | tuple) else tensors
    check_call_alike(given, policy, micro_group, ranks)
    exchange = Exchange(ranks, int(micro_group))
    flats = [t.detach().contiguous().view(-1) for t in given]
    for flat in flats:
        exchange.send(flat)
    decision = settle(exchange, policy)
    for t, flat in zip(given, flats, strict=True):
        if not t.is_contiguous():
            t.copy_(flat.view(t.shape))
    return decision


def settle(exchange: Exchange, policy: Policy) -> Decision:
    """Gram matrix, decision, and the update in the places that the pieces came from."""
    exchange.receive()
    products = exchange.local_products()
    gram = add_in_rank_order(products.reshape(-1), exchange.group).view_as(products)
    decision, _ = decide_with_evidence(policy, gram)
    weights, stepped = decision.weights.tolist(), bool(decision.stepped)
    check_weights(weights, stepped, policy)
    if stepped:
        exchange.give_back(weights, merge_of(policy))
    else:
        exchange.fill(0.0)
    return decision


def group_of(group: Any) -> Any:
    """The process group that is meant."""
    if group is None and not dist.is_initialized():
        raise RuntimeError(
            "all_reduce: torch.distributed must be initialised; it is not. "
            "Call dist.init_process_group first, also for a single process; or give group=."
        )
    found = process_group(group, "group", HERE)
    return dist.group.WORLD if found is None else found


def check_call_alike(tensors: Any, policy: Any, micro_group: Any, group: Any) -> None:
    """Raises on all ranks if one of them gave what cannot work, or other things than the others.

    Costs one number per rank; only if something is wrong the ranks exchange more.
    """
    problem, mine = None, {}
    try:
        mine = describe_call(tensors, policy, micro_group, group)
    except (TypeError, ValueError) as error:
        problem = error
    mark = -1 if problem else zlib.crc32(repr(mine).encode())
    device = device_of(group, None if problem else tensors[0].device)
    extremes = torch.tensor([mark, -mark], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = extremes.tolist()
    if highest == -lowest >= 0:
        return
    if problem is not None:
        tell(group, str(problem))
        raise problem
    tell(group, "")
    check_same(mine, group, HERE)


def tell(group: Any, problem: str) -> None:
    """RuntimeError on a rank without a problem, if another rank has one."""
    problems = gather_objects(problem, group)
    if any(problems) and not problem:
        rank = next(r for r, other in enumerate(problems) if other)
        raise RuntimeError(
            f"all_reduce: every rank must be able to take part; rank {rank} of the group is not. "
            f"It reports: {problems[rank]}"
        )


def describe_call(tensors: Any, policy: Any, micro_group: Any, group: Any) -> dict[str, str]:
    """What all ranks must have in common."""
    check_tensors(tensors)
    check_device(tensors[0].device, group)
    check_policy(policy, HERE)
    check_no_optimizer_metric(policy, HERE, "no optimizer is known here")
    check_micro_group(micro_group, HERE)
    check_divides(int(micro_group), group, HERE)
    shapes = [f"tensor {i} {tuple(t.shape)} {t.dtype}" for i, t in enumerate(tensors)]
    return {
        "policy": describe_policy(policy),
        "micro_group": str(int(micro_group)),
        "tensors": "; ".join(shapes),
        "kind of device": tensors[0].device.type,
    }


def check_device(device: torch.device, group: Any) -> None:
    kinds = kinds_of_devices(group)
    if kinds and device.type not in kinds:
        raise ValueError(
            "all_reduce: tensors must be on a device that the group sends from, "
            f"{' or '.join(sorted(kinds))}; they are on {device}. Move them, or give another group."
        )


def check_tensors(tensors: Any) -> None:
    if not isinstance(tensors, list | tuple) or not tensors:
        found = "none" if isinstance(tensors, list | tuple) else type(tensors).__name__
        raise TypeError(
            f"all_reduce: tensors must be a list of at least one tensor; got {found}. "
            "Use list(...)."
        )
    for i, t in enumerate(tensors):
        check_tensor(i, t, tensors[0])


def check_tensor(i: int, t: Any, first: Any) -> None:
    plain = isinstance(t, Tensor) and not hasattr(t, "to_local")
    if not plain:
        raise TypeError(
            f"all_reduce: tensors must be torch tensors of this rank alone; number {i} is a "
            f"{type(t).__name__}. Use t.to_local() of a DTensor."
        )
    if not t.is_floating_point() or t.layout != torch.strided or t.device != first.device:
        raise ValueError(
            f"all_reduce: tensors must be dense, of floating-point types and on one device; number "
            f"{i} is {t.dtype}, {t.layout}, on {t.device}, the first on {first.device}. "
            "Convert it, or leave it out."
        )
