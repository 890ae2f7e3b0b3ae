"""Small pictures in files, and a run on them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gaf_lab.settings.config import TrainConfig

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W) or (H, W, 3)
CPU = torch.device("cpu")
SMALL = TrainConfig(
    dataset="imagenet",
    size=16,
    model="convnet",
    k=2,
    b=6,
    passes=4.0,
    eval_every=2.0,
    augment=True,
    tau=1.0,
)


def save(path: Path, pixels: Pixels, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def random_pixels(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
