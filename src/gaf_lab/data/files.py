"""Pictures that stay in their files: read when they are needed."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gaf_lab.data.jpeg import crop, decode, draw_crops


@dataclass(frozen=True, eq=False)
class Files:
    """Pictures (N, 3, size, size) uint8 that stay in their files until they are needed.

    Attributes:
        folder: holds them.
        names: (N,) paths in it, as bytes of one width: 40 MB for ImageNet, shared by processes.
        size: height and width that they are scaled to.
    """

    folder: Path
    names: "np.ndarray[Any, np.dtype[np.bytes_]]" = field(repr=False)
    size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor) -> "Files":
        return Files(self.folder, self.names[index.numpy()], self.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    def read(self, index: Iterable[int], draw: torch.Generator | None = None) -> Tensor:
        """Pictures (len(index), 3, size, size) uint8: random crops by `draw`; None: the middle."""
        paths = [self.folder / os.fsdecode(self.names[i]) for i in index]
        crops: list[Tensor | None] = [None] * len(paths)
        if draw is not None:
            crops = list(draw_crops(len(paths), draw).unbind())
        pictures = torch.empty(len(paths), *self.shape[1:], dtype=torch.uint8)
        for picture, path, numbers in zip(pictures, paths, crops, strict=True):
            picture.copy_(crop(decode(path), self.size, numbers))
        return pictures


@dataclass(frozen=True, eq=False)
class LabelledFiles(Dataset[tuple[Tensor, Tensor]]):
    """Pictures in files with their labels (N,). augment: whether training crops them at random."""

    files: Files
    targets: Tensor
    augment: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.files.read([i])[0], self.targets[i]

    def read(self, index: list[int], draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
        pictures = self.files.read(index, draw if self.augment else None)
        return pictures, self.targets[index]
