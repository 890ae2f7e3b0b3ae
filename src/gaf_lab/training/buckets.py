"""One decision for each bucket of parameters, on one device.

That is GAF(scope="group") under DistributedDataParallel.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size
from torch.optim import Optimizer

import gaf

FIRST, OTHERS = 2**20, 25 * 2**20  # bytes: the limits of DistributedDataParallel's buckets


def buckets(params: Sequence[nn.Parameter]) -> list[list[int]]:
    """The parameters' indices in the buckets of DistributedDataParallel.

    It goes from the last layer to the first, and the first bucket is small.
    """
    order = list(reversed(range(len(params))))
    reversed_params = [Tensor(params[j]) for j in order]
    groups, _ = _compute_bucket_assignment_by_size(reversed_params, [FIRST, OTHERS])
    return [[order[i] for i in group] for group in groups]


class PerBucket(gaf.Accumulator):
    """scope="layer" with buckets in place of layers."""

    def __init__(self, optimizer: Optimizer, policy: gaf.GAF, model: nn.Module) -> None:
        super().__init__(optimizer, dataclasses.replace(policy, scope="layer"), model=model)

    def _layers(self) -> dict[str, list[int]]:
        return {f"bucket {i}": bucket for i, bucket in enumerate(buckets(self._params.current))}
