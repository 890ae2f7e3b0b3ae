"""The task of a config that names none: a data set of pictures, and a network for them."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gaf_lab.data import noise
from gaf_lab.data.augment import affine, draw_shifts, shift
from gaf_lab.data.dataset import DataSet
from gaf_lab.data.files import Files, LabelledFiles
from gaf_lab.data.problem import Augmentation, Part, Problem
from gaf_lab.data.sets import imagenet_of, load_once
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.models import make_model

# at most so many pictures, and pixels in all, go through the model at once in an evaluation
BATCH, PIXELS = 1000, 2**21


class Normalise:
    """Bytes to normalised floats: `gaf_lab.data.augment.normalise` with these constants."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = mean, std
        # kept here: a captured graph reads them
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.device not in self._constants:
            self._constants[x.device] = affine(self.mean, self.std, x.device)
        scale, offset = self._constants[x.device]
        return x.to(torch.float32, copy=True).mul_(scale).sub_(offset)


def pictures(config: TrainConfig, data: Path | None = None) -> Problem:
    """The config's data set and model.

    data: folder of the data set's archive or files; None downloads it.
    """
    found = load_data(config, data)
    channels, height, width = found.train_x.shape[1:]
    shape, classes = (channels, height, width), found.classes
    cropped = config.augment and isinstance(found.train_x, Tensor)  # files are cropped when read
    given = labels(config, found)
    return Problem(
        model=partial(make_model, config.model, shape, classes, config.stem),
        train=as_part(found.train_x, given, config.augment),
        test=as_part(found.test_x, found.test_y, augment=False),
        clean=found.train_y,
        classes=classes,
        augment=Augmentation(draw_shifts, shift) if cropped else None,
        prepare=Normalise(found.mean, found.std),
        superclasses=found.coarse,
        batch=max(1, min(BATCH, PIXELS // (height * width))),
        read_ahead=True,
        captures=True,
        name=found.name,
    )


def load_data(config: TrainConfig, folder: Path | None) -> DataSet:
    if config.dataset == "imagenet":
        return imagenet_of(config.size, folder)
    return load_once(config.dataset, folder)


def labels(config: TrainConfig, data: DataSet) -> Tensor:
    """The training labels that come with the data: people's, if the config asks for them."""
    if config.noise == "human":
        return noise.human(data.train_y, data.human)[0]
    return data.train_y


def as_part(x: Tensor | Files, y: Tensor, augment: bool) -> Part:
    return LabelledFiles(x, y, augment) if isinstance(x, Files) else (x, y)
