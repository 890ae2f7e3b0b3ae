"""Samples that stay in a Dataset, and their micro-batches: read when they are needed.

The content of a micro-batch, and what is drawn for it, is a function of the seed and of the
micro-batch's number alone. So any process can read any micro-batch, and workers read ahead in the
order of the numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gaf_lab.data.problem import check_finite
from gaf_lab.data.read_ahead import read_ahead
from gaf_lab.data.sampling import Sampler, generator
from gaf_lab.settings.checks import ConfigError


@dataclass(frozen=True, eq=False)
class Items:
    """Some samples of a Dataset.

    Attributes:
        places: (N,) int64, the samples in it.
        collate: makes a batch of items.
        ahead: whether worker processes read them ahead.
    """

    dataset: Dataset[Any]
    places: Tensor
    collate: Callable[[list[Any]], Any]
    ahead: bool

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Tensor) -> "Items":
        return Items(self.dataset, self.places[index.cpu()], self.collate, self.ahead)

    def read(self, index: Sequence[int], draw: torch.Generator | None = None) -> tuple[Any, Any]:
        """Inputs and targets of samples, on the CPU. draw: for random changes, in training."""
        places = self.places[list(index)].tolist()
        if hasattr(self.dataset, "read"):
            found = self.dataset.read(places, draw)
        else:
            found = self.collate([self.dataset[i] for i in places])
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ConfigError(
                "a Dataset must give tuples (inputs, targets), of which collate makes one; "
                f"got {type(found).__name__}. Return both from __getitem__."
            )
        inputs, targets = found
        if isinstance(targets, Tensor):
            check_finite("a Dataset", targets)
        return inputs, targets

    def split(self, n: int) -> Iterator[tuple[Any, Any]]:
        """All samples in order, n at a time (fewer at the end)."""
        chunks, numbers = Chunks(self, n), range(math.ceil(len(self) / n))
        return read_ahead(chunks, numbers) if self.ahead else map(chunks, numbers)

    def all_targets(self) -> Tensor | None:
        """The targets (N,) of samples that have classes; None if they have none.

        From the Dataset's attribute `targets`, or item by item.
        """
        known = getattr(self.dataset, "targets", None)
        if known is not None:
            return torch.as_tensor(known)[self.places]
        if not is_class(self.dataset[int(self.places[0])][1]):
            return None
        return torch.tensor([int(self.dataset[i][1]) for i in self.places.tolist()])


def is_class(target: Any) -> bool:
    if isinstance(target, Tensor):
        return target.dtype == torch.int64 and target.dim() == 0
    return isinstance(target, int) and not isinstance(target, bool)


@dataclass(frozen=True, eq=False)
class Chunks:
    """Part j of the samples: n of them from j * n on."""

    items: Items
    n: int

    def __call__(self, j: int) -> tuple[Any, Any]:
        return self.items.read(range(j * self.n, min((j + 1) * self.n, len(self.items))))


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Micro-batch `number` = step * k + i: inputs and targets of b samples."""

    items: Items
    sampler: Sampler
    seed: int
    k: int

    def __call__(self, number: int) -> tuple[Any, Any]:
        draw = generator(self.seed, "augment", *divmod(number, self.k))
        return self.items.read(self.sampler.draw(number).tolist(), draw)
