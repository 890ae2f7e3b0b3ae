"""A data set: pictures as bytes, labels as numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gaf_lab.data.files import Files
from gaf_lab.data.sampling import generator
from gaf_lab.data.sources import DataError


@dataclass(frozen=True, eq=False)
class DataSet:
    """Pictures (N, C, H, W) uint8 and labels (N,) int64 in [0, classes), on the CPU.

    Pictures are in memory, or in files.

    Attributes:
        coarse: super-class of each class (classes,) int64, or None.
        human: labels of the training set given by people (N,) int64, or None.
        mean, std: per channel, of training pictures in [0, 1].

    Raises:
        DataError: if the shapes do not fit, or a label is out of range.
    """

    name: str
    train_x: Tensor | Files
    train_y: Tensor
    test_x: Tensor | Files
    test_y: Tensor
    classes: int
    coarse: Tensor | None
    human: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        self._check("train", self.train_x, self.train_y)
        self._check("test", self.test_x, self.test_y)
        if self.human is not None:
            check_labels(self.human, self.classes, f"{self.name}: human labels")

    def _check(self, part: str, x: Tensor | Files, y: Tensor) -> None:
        if len(x) != len(y):
            raise DataError(
                f"{self.name}: every {part} picture must have a label; "
                f"got {len(x)} pictures and {len(y)} labels. Is the file whole?"
            )
        check_labels(y, self.classes, f"{self.name}: {part} labels")


def check_labels(y: Tensor, classes: int, what: str) -> None:
    if ((y < 0) | (y >= classes)).any():
        raise DataError(
            f"{what} must lie in [0, {classes}); got {int(y.min())} to {int(y.max())}. "
            "Is it the file of another data set?"
        )


def describe_dataset(data: DataSet) -> dict[str, str]:
    """Facts about a data set, by name, as text."""
    facts = {
        "name": data.name,
        "pictures": " x ".join(map(str, data.train_x.shape[1:])),
        "classes": str(data.classes),
        "super-classes": "none" if data.coarse is None else str(len(set(data.coarse.tolist()))),
        "training samples": _class_counts(data.train_y, data.classes),
        "test samples": _class_counts(data.test_y, data.classes),
        "mean": ", ".join(f"{m:.4f}" for m in data.mean),
        "standard deviation": ", ".join(f"{s:.4f}" for s in data.std),
    }
    if data.human is not None:
        wrong = (data.human != data.train_y).double().mean().item()
        facts["human labels"] = f"{wrong:.2%} differ from the clean ones"
    return facts


def _class_counts(y: Tensor, classes: int) -> str:
    counts = torch.bincount(y, minlength=classes)
    least, most = int(counts.min()), int(counts.max())
    each = f"{least}" if least == most else f"{least} to {most}"
    return f"{len(y)}, {each} per class"


def split_off_test(name: str, x: Tensor, y: Tensor, classes: int) -> DataSet:
    """A fifth of each class, always the same, becomes the test set."""
    draw = generator(0, name, "test set")
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(classes):
        members = (y == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=draw)
        test[members[order[: round(len(members) / 5)]]] = True
    mean, std = moments(x[~test])
    return DataSet(name, x[~test], y[~test], x[test], y[test], classes, None, None, mean, std)


def moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of pictures (N, C, H, W) uint8, scaled to [0, 1]."""
    level = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in x.unbind(1)]
    shares = torch.stack(counts).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ level
    std = (shares @ level**2 - mean**2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
