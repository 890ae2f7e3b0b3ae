"""Which ranks, on which machines, each row comes from."""

import socket
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch.distributed as dist

from gaf.record.alarms import Worker

Places = list[tuple[int, str]]  # ranks and their machines


def gather_workers(groups: "Sequence[dist.ProcessGroup]", micro_group: int) -> list[Worker]:
    """The worker, or workers, of each row. All ranks of the groups call it together.

    Args:
        groups: the ranks whose rows are compared, then those over which one row is spread.
        micro_group: so many consecutive ranks of the first group are one row.
    """
    places: Places = [(dist.get_rank(), socket.gethostname())]
    for group in groups[1:]:
        places = list(chain(*gather_objects(places, group)))
    parts = gather_objects(places, groups[0])
    starts = range(0, len(parts), micro_group)
    rows = [sorted(chain(*parts[start : start + micro_group])) for start in starts]
    return [Worker(row[0][0], row[0][1], tuple(rank for rank, _ in row)) for row in rows]


def gather_objects(mine: Any, group: "dist.ProcessGroup") -> list[Any]:
    """What each rank of a group gave, in their order."""
    all_of: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_of, mine, group=group)
    return all_of
