"""Samples with two sets of targets: those that are trained on, and the truth."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gaf_lab.data.items import Items
from gaf_lab.data.trees import map_tensors, move_to, rows_of, tensors_in


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs, in memory or in a Dataset, and their targets.

    Attributes:
        x: tensors with a row for each sample, or the items of a Dataset.
        observed: the targets that are trained on (N, ...); None if only the Dataset knows them.
        clean: the true targets (N, ...), or None.
    """

    x: Any
    observed: Tensor | None
    clean: Tensor | None

    def __len__(self) -> int:
        return len(self.x) if isinstance(self.x, Items) else len(tensors_in(self.x)[0])

    def __getitem__(self, index: Tensor) -> "Samples":
        x = self.x[index] if isinstance(self.x, Items) else rows_of(self.x, index)
        return Samples(x, rows_of(self.observed, index), rows_of(self.clean, index))

    def to(self, device: torch.device) -> "Samples":
        """All tensors on the device. The items of a Dataset move there when they are read."""
        x = self.x if isinstance(self.x, Items) else move_to(self.x, device)
        return Samples(x, move_to(self.observed, device), move_to(self.clean, device))

    @property
    def labels(self) -> Tensor:
        """The observed targets of samples that have classes."""
        assert self.observed is not None
        return self.observed

    @property
    def truth(self) -> Tensor:
        """The clean targets of samples that have classes."""
        assert self.clean is not None
        return self.clean

    def targets(self, index: Tensor, read: Any) -> Any:
        """The observed targets of some samples. read: what the Dataset gave for them."""
        return read if self.observed is None else self.observed[index]

    def batches(self, n: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
        """Inputs and observed targets of all samples in order, n at a time, on the device."""
        for start, (x, read) in zip(range(0, len(self), n), self._split(n), strict=True):
            if self.observed is not None:
                read = self.observed[start : start + n]
            yield move_to(x, device), move_to(read, device)

    def _split(self, n: int) -> Iterator[tuple[Any, Any]]:
        if isinstance(self.x, Items):
            return self.x.split(n)
        starts = range(0, len(self), n)
        return ((map_tensors(lambda t, i=i: t[i : i + n], self.x), None) for i in starts)  # type: ignore[misc]
