"""Pictures that stay in their files, and their micro-batches: read when they are needed.

The content of a micro-batch, and the crop of each of its pictures, is a function of the seed and of
the micro-batch's number alone. So any process can read any micro-batch, and workers read ahead in
the order of the numbers.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data.jpeg import crop, decode, draw_crops
from gaf_lab.data.read_ahead import read_ahead
from gaf_lab.data.sampling import Sampler, generator


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

    def split(self, n: int) -> Iterator[Tensor]:
        """The middle of all pictures in order, n at a time (fewer at the end), read by workers."""
        return read_ahead(Chunks(self, n), range(math.ceil(len(self) / n)))


@dataclass(frozen=True, eq=False)
class Chunks:
    """Part j of the pictures: n of them from j * n on."""

    files: Files
    n: int

    def __call__(self, j: int) -> Tensor:
        return self.files.read(range(j * self.n, min((j + 1) * self.n, len(self.files))))


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Micro-batch `number` = step * k + i: pictures (b, 3, size, size) uint8.

    They are cropped at random if `augment` is set.
    """

    files: Files
    sampler: Sampler
    seed: int
    k: int
    augment: bool

    def __call__(self, number: int) -> Tensor:
        draw = generator(self.seed, "augment", *divmod(number, self.k)) if self.augment else None
        return self.files.read(self.sampler.draw(number).tolist(), draw)
