"""Pictures with two sets of labels: those that are trained on, and the truth."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gaf_lab.data.files import Files


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures (N, C, H, W) uint8, in memory or in files, and their labels (N,).

    Attributes:
        observed: the labels that are trained on.
        clean: the true labels.
    """

    x: Tensor | Files
    observed: Tensor
    clean: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> "Pictures":
        return Pictures(self.x[index], self.observed[index], self.clean[index])

    def to(self, device: torch.device) -> "Pictures":
        """Labels and pictures on the device. Pictures in files move there when they are read."""
        x = self.x.to(device) if isinstance(self.x, Tensor) else self.x
        return Pictures(x, self.observed.to(device), self.clean.to(device))

    def batches(self, n: int) -> Iterator[Tensor]:
        """All pictures in order, n at a time, on the labels' device."""
        return (x.to(self.clean.device) for x in self.x.split(n))
