"""What travels between ranks: slices of a gradient by all-to-all and all-gather, and shares of K.

Between gloo processes on a CPU the slices travel as messages from rank to rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TAG = 2**20  # of the first message between gloo processes; a user's own are numbered lower
# Up to so many ranks each adds up all shares of K; among more, each adds up a block of entries.
FEW = 32

# all_gather_single is torch 2.13's name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def device_of(group: "dist.ProcessGroup", own: torch.device | None) -> torch.device:
    """Where the ranks of a group exchange a few numbers: the same kind of device on all of them.

    own: of this rank's tensors; None if it has none.
    """
    kinds = kinds_of_devices(group)
    if "cpu" in kinds:
        return torch.device("cpu")
    if own is not None and own.type in (kinds or {own.type}):
        return own
    return torch.device(min(kinds, default="cpu"))


def kinds_of_devices(group: "dist.ProcessGroup") -> set[str]:
    """Of the devices that a group sends from; empty if it does not tell."""
    return {device.type for device in getattr(group, "_device_types", ())}


def all_to_all(slices: Tensor, places: Tensor, group: "dist.ProcessGroup", tag: int) -> list[Any]:
    """Starts: slices[r] <- rank r's places[this rank]. (W, c) each."""
    if not sends_messages(group, places):
        into, out = slices.view(-1), places.view(-1)
        return [dist.all_to_all_single(into, out, group=group, async_op=True)]
    me = group.rank()
    works = start_messages(list(slices), list(places), group, tag)
    slices[me].copy_(places[me])
    return works


def all_gather(places: Tensor, group: "dist.ProcessGroup", tag: int) -> list[Any]:
    """Starts: places[r] <- rank r's places[r]. (W, c)."""
    mine = places[group.rank()]
    if not sends_messages(group, places):
        return [_all_gather(places.view(-1), mine, group=group, async_op=True)]
    return start_messages(list(places), [mine] * len(places), group, tag)


def sends_messages(group: "dist.ProcessGroup", tensor: Tensor) -> bool:
    """Whether slices travel as messages.

    Over a slow link gloo's own all-to-all takes longer than messages whose receivers are posted
    first (docs/cost.md has figures).
    """
    return tensor.device.type == "cpu" and is_known(group) and dist.get_backend(group) == "gloo"


def is_known(group: "dist.ProcessGroup") -> bool:
    """Whether torch.distributed made the group. One of torchft's has no messages and no names."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except KeyError:
        return False


def first_rank(group: "dist.ProcessGroup") -> int:
    """The global rank of the group's first member; 0 for a group that has no global ranks."""
    return dist.get_process_group_ranks(group)[0] if is_known(group) else 0


def start_messages(
    into: list[Tensor], out: list[Tensor], group: "dist.ProcessGroup", tag: int
) -> list[Any]:
    """Starts: into[r] <- rank r's out[this rank], for every other rank, the nearest first."""
    me, W = group.rank(), dist.get_world_size(group)
    before = [(me - d) % W for d in range(1, W)]
    after = [(me + d) % W for d in range(1, W)]
    receiving = [dist.irecv(into[r], group=group, group_src=r, tag=tag) for r in before]
    return receiving + [dist.isend(out[r], group=group, group_dst=r, tag=tag) for r in after]


def add_in_rank_order(partial: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum over ranks, the same bits on each, on the host, which waits for the device.

    Args:
        partial: (p,) float64, this rank's share.
        group: the ranks to add over.
    """
    W, p = dist.get_world_size(group), partial.numel()
    if W <= FEW:
        shares = partial.new_empty(W, p)
        _all_gather(shares.view(-1), partial, group=group)
        return sum_of(shares.cpu())
    padded = torch.cat([partial, partial.new_zeros(-p % W)])
    shares = torch.empty_like(padded).view(W, -1)
    dist.all_to_all_single(shares.view(-1), padded, group=group)
    _all_gather(padded, sum_of(shares), group=group)
    return padded[:p].cpu()


def sum_of(shares: Tensor) -> Tensor:
    """(p,) from (W, p), added in the order of the rows."""
    total: Tensor = shares[0].clone()
    for share in shares[1:]:
        total += share
    return total
