"""The task of an .npz file, `--data FILE`: classes or numbers, from pictures or rows of numbers."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gaf_lab.data.arrays import CHANNELS, Arrays, read_arrays
from gaf_lab.data.augment import draw_shifts, shift
from gaf_lab.data.dataset import moments
from gaf_lab.data.problem import Augmentation, Problem
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.tasks.pictures import Normalise
from gaf_lab.training.models import make_model, mlp


def arrays(config: TrainConfig, data: Path | None = None) -> Problem:
    """What `gaf data --from ... --out FILE` wrote.

    Pictures of bytes are normalised, augmented if the config says so, and go to the config's
    model; all else goes to a network of two hidden layers.
    """
    found = read_arrays(data)
    pictures = found.train[0].dim() == 4 and found.train[0].shape[1] in CHANNELS
    return of_pictures(config, found) if pictures else of_rows(config, found)


def of_pictures(config: TrainConfig, found: Arrays) -> Problem:
    x, y = found.train
    if y.is_floating_point():
        raise ConfigError(
            "pictures must have classes for targets; these have numbers. Write a task of your own."
        )
    channels, height, width = x.shape[1:]
    classes = count(found)
    shape = channels, height, width
    return Problem(
        model=partial(make_model, config.model, shape, classes, config.stem),
        train=found.train,
        test=found.test,
        classes=classes,
        augment=Augmentation(draw_shifts, shift) if config.augment else None,
        prepare=Normalise(*moments(x)) if not x.is_floating_point() else None,
        captures=True,
        class_names=found.classes,
        sample_names=found.names[0],
    )


def of_rows(config: TrainConfig, found: Arrays) -> Problem:
    (x, y), (test_x, test_y) = found.train, found.test
    width = 128 if config.model == "mlp-small" else 512
    inputs = x[0].numel()
    both: dict[str, Any] = {
        "train": (x.float(), y),
        "test": (test_x.float(), test_y),
        "captures": True,
        "sample_names": found.names[0],
    }
    if not y.is_floating_point():
        classes = count(found)
        model = partial(mlp, inputs, classes, width)
        return Problem(model=model, classes=classes, class_names=found.classes, **both)
    network = partial(one_number, inputs, width)
    return Problem(model=network, loss=squared_error, **both)


def one_number(inputs: int, width: int) -> nn.Module:
    """A network that predicts a number for each sample."""
    return nn.Sequential(mlp(inputs, 1, width), nn.Flatten(0))


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target) ** 2


def count(found: Arrays) -> int:
    """Classes: as many as have names, or one more than the largest label."""
    largest = max(int(found.train[1].max()), int(found.test[1].max()))
    return max(len(found.classes), largest + 1)
