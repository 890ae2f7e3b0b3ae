"""Data that are made, not found: pictures in ImageNet's layout, and white noise."""

import math
from pathlib import Path

import torch
from PIL import Image

from gaf_lab.data.dataset import DataSet
from gaf_lab.data.sampling import generator


def make_pictures(folder: Path, classes: int, per_class: int, size: int, seed: int = 0) -> Path:
    """Writes JPEG files in ImageNet's layout, for tests and trials; returns the folder.

    A small network can distinguish the classes. Class c of C is a grating at angle pi c / C, in
    colours of hue c / C, under noise. Each picture has its own phase, place and shape.

    Args:
        folder: gets train and val; made if it is missing.
        classes: C, at least 1.
        per_class: training pictures of each, at least 1; for test a quarter of that, at least one.
        size: pixels of the shorter side; the longer one has up to half as many again.
        seed: the same seed, the same pictures.
    """
    for part, count in (("train", per_class), ("val", max(1, per_class // 4))):
        for c in range(classes):
            home = folder / part / f"n{c:08d}"
            home.mkdir(parents=True, exist_ok=True)
            for j in range(count):
                picture = grating(c / classes, size, generator(seed, "picture", part, c, j))
                picture.save(home / f"n{c:08d}_{j}.JPEG", quality=90)
    return folder


def grating(turn: float, size: int, draw: torch.Generator) -> Image.Image:
    """A picture of the class at `turn` in [0, 1)."""
    phase, longer, upright = torch.rand(3, generator=draw).tolist()
    sides = (size, size + round(size * longer / 2))
    height, width = sides[::-1] if upright < 0.5 else sides
    down, across = torch.meshgrid(
        torch.arange(height) / size, torch.arange(width) / size, indexing="ij"
    )
    along = across * math.cos(math.pi * turn) + down * math.sin(math.pi * turn)
    wave = torch.sin(2 * math.pi * (4 * along + phase))[:, :, None]
    colour = torch.cos(2 * math.pi * (turn - torch.arange(3) / 3))
    noise = torch.randn(height, width, 3, generator=draw)
    pixels = (128 + 60 * colour + 40 * wave + 20 * noise).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def white_noise(
    train: int = 50_000, test: int = 10_000, classes: int = 100, seed: int = 0
) -> DataSet:
    """Pictures 3 x 32 x 32 of independent uniform bytes with independent uniform labels.

    No gradient agrees with another for a reason.

    Args:
        train: training samples; train + test must be at least 1.
        test: test samples.
        classes: at least 1.
        seed: the same seed, the same data set.
    """
    draw = generator(seed, "white noise")
    words = torch.empty((train + test) * 3 * 32 * 32 // 8, dtype=torch.int64)
    x = words.random_(-(2**63), None, generator=draw).view(torch.uint8).view(-1, 3, 32, 32)
    y = torch.randint(classes, (train + test,), generator=draw)
    spread = ((256**2 - 1) / 12) ** 0.5 / 255
    moments = (0.5,) * 3, (spread,) * 3
    parts = x[:train], y[:train], x[train:], y[train:]
    return DataSet("noise", *parts, classes, None, None, *moments)
