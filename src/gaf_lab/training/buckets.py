"""One decision for each bucket of parameters, on one device: what GAF(scope="group") does under DistributedDataParallel."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size
from torch.optim import Optimizer

import gaf

FIRST, OTHERS = 2**20, 25 * 2**20  # bytes: the caps of DistributedDataParallel's buckets


def buckets(params: Sequence[nn.Parameter]) -> list[list[int]]:
    """Parameters' indices as DistributedDataParallel puts them into buckets: from the last layer on, the first bucket small."""
    order = list(reversed(range(len(params))))
    groups, _ = _compute_bucket_assignment_by_size(
        [Tensor(params[j]) for j in order], [FIRST, OTHERS]
    )
    return [[order[i] for i in group] for group in groups]


class PerBucket(gaf.Accumulator):
    """scope="layer" with buckets in the place of layers."""

    def __init__(self, optimizer: Optimizer, policy: gaf.GAF, model: nn.Module) -> None:
        super().__init__(optimizer, dataclasses.replace(policy, scope="layer"), model=model)

    def _layers(self) -> dict[str, list[int]]:
        return {f"bucket {i}": bucket for i, bucket in enumerate(buckets(self._params.current))}
