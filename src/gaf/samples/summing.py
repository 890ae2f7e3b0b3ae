"""Sums over the ranks, of which each step starts one and the next step takes the result."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from gaf.samples.class_statistics import ClassStatistics
from gaf.shapes import Float


class Summing:
    """A sum in progress.

    Args:
        group: of the ranks; None for the default one, if there is one.
        apart: whether each rank is a part of its own.
    """

    def __init__(self, group: dist.ProcessGroup | None, apart: bool) -> None:
        self.group, self.apart = group, apart
        self.sums: Tensor | None = None
        self.work: Any = None

    @property
    def left_out(self) -> int | None:
        """The part of this rank, if its samples are judged by the other ranks."""
        return dist.get_rank(self.group) if self.apart and ranks_of(self.group) > 1 else None

    def start(self, sums: Float[Tensor, " s"], statistics: ClassStatistics) -> None:
        """Starts the sum over ranks. A rank alone has it, so its statistics take it at once.

        Then no step needs a tensor of the one before, and a CUDA graph of a step can be repeated.
        """
        if ranks_of(self.group) == 1:
            statistics.absorb(sums)
        else:
            self.sums = sums
            self.work = dist.all_reduce(sums, group=self.group, async_op=True)

    def mean(self, total: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Of the ranks' numbers, which all ranks wait for."""
        ranks = ranks_of(self.group)
        if ranks > 1:
            dist.all_reduce(total, group=self.group)
        return total / ranks

    def take(self) -> Float[Tensor, " s"] | None:
        """Waits for the sum; None if there is none."""
        if self.work is not None:
            self.work.wait()
        sums, self.sums, self.work = self.sums, None, None
        return sums


def ranks_of(group: dist.ProcessGroup | None) -> int:
    """How many ranks there are; 1 without a process group."""
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if there else 1


def finish_sum(module: Any, *_: Any) -> None:
    """Adds the sum in progress to the module's statistics: before a step, and before a save."""
    sums = module._summing.take()
    if sums is not None:
        module.statistics.absorb(sums)
