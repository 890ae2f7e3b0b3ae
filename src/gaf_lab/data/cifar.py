"""CIFAR-10 and CIFAR-100, and CIFAR-100N: its labels given by people."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data import sources
from gaf_lab.data.archives import locate, read_archive
from gaf_lab.data.dataset import DataSet, check_labels
from gaf_lab.data.sources import Archive, DataError
from gaf_lab.data.unpickle import entry, load_pt, unpickle


def cifar10(folder: Path | None) -> DataSet:
    batches = _read_batches(sources.CIFAR10, folder)
    xs, ys = [], []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        xs.append(_pictures(batches[name], f"cifar10: {name}"))
        ys.append(_labels(batches[name], "labels", f"cifar10: {name}"))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return DataSet(
        "cifar10", torch.cat(xs[:5]), torch.cat(ys[:5]), xs[5], ys[5], 10, None, None, mean, std
    )


def cifar100(
    folder: Path | None, name: str = "cifar100", kind: str = "fine", with_human: bool = False
) -> DataSet:
    """CIFAR-100 by its 100 fine or its 20 coarse labels.

    with_human: with CIFAR-100N's labels of that kind.
    """
    batches = _read_batches(sources.CIFAR100, folder)
    train, test = batches["train"], batches["test"]
    xs = _pictures(train, f"{name}: train"), _pictures(test, f"{name}: test")
    fine, coarse = (_both_labels(train, test, kind, name) for kind in ("fine", "coarse"))
    groups = superclasses(fine[0], coarse[0], name) if kind == "fine" else None
    ys, classes = (fine, 100) if kind == "fine" else (coarse, 20)
    human = _human_labels(folder, name, kind, ys[0]) if with_human else None
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    return DataSet(name, xs[0], ys[0], xs[1], ys[1], classes, groups, human, mean, std)


def _both_labels(
    train: dict[str, Any], test: dict[str, Any], kind: str, name: str
) -> tuple[Tensor, Tensor]:
    key = f"{kind}_labels"
    return _labels(train, key, f"{name}: train"), _labels(test, key, f"{name}: test")


def cifar100n(folder: Path | None) -> DataSet:
    return cifar100(folder, "cifar100n", "fine", with_human=True)


def cifar100n_coarse(folder: Path | None) -> DataSet:
    return cifar100(folder, "cifar100n-coarse", "coarse", with_human=True)


def _read_batches(archive: Archive, folder: Path | None) -> dict[str, dict[str, Any]]:
    contents = read_archive(archive, folder)
    return {name: unpickle(raw, f"{archive.folder}/{name}") for name, raw in contents.items()}


def _pictures(batch: dict[str, Any], what: str) -> Tensor:
    """(N, 3, 32, 32) uint8: each row is the red, the green, then the blue plane."""
    rows = entry(batch, "data", what)
    array = isinstance(rows, np.ndarray)
    if not array or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        seen = f"{rows.dtype} of shape {rows.shape}" if array else type(rows).__name__
        raise DataError(
            f"{what}: 'data' must be uint8 of shape (N, 3072); got {seen}. "
            "Is it the file of another data set?"
        )
    return torch.from_numpy(np.require(rows, requirements=["C", "W"])).view(-1, 3, 32, 32)


def _labels(values: dict[str, Any], key: str, what: str) -> Tensor:
    """(N,) int64."""
    found = entry(values, key, what)
    try:
        whole = np.asarray(found).astype(np.int64, casting="same_kind")
        return torch.from_numpy(whole).reshape(len(found))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what}: {key!r} must be a list of whole numbers; it is not ({error}). "
            "Is it the file of another data set?"
        ) from None


def superclasses(fine: Tensor, coarse: Tensor, name: str) -> Tensor:
    """The super-class (100,) of each class, from the labels of all samples, which must agree."""
    check_labels(fine, 100, f"{name}: train labels")
    check_labels(coarse, 20, f"{name}: coarse train labels")
    if len(fine) != len(coarse):
        raise DataError(
            f"{name}: every train picture must have a coarse label; "
            f"got {len(fine)} fine and {len(coarse)} coarse labels. Is the file whole?"
        )
    groups = torch.zeros(100, dtype=torch.int64)
    groups[fine] = coarse
    if not torch.equal(groups[fine], coarse):
        raise DataError(
            f"{name}: every class must lie in one super-class; "
            "in the training labels one lies in two. Is the file damaged?"
        )
    return groups


def _human_labels(folder: Path | None, name: str, kind: str, clean: Tensor) -> Tensor:
    """CIFAR-100N's labels, which must be of these samples in this order."""
    inside = folder is not None and folder.name == sources.CIFAR100.folder
    path = locate(sources.HUMAN_LABELS, folder, *([folder.parent] if folder and inside else []))
    values = load_pt(path)
    prefix = "" if kind == "fine" else "coarse_"
    if not torch.equal(_labels(values, f"clean_{prefix}label", str(path)), clean):
        raise DataError(
            f"{path}: its clean labels must be those of CIFAR-100 in the same order; they are not, "
            "so the human labels would be of other pictures. "
            f"Get the file again from {sources.HUMAN_LABELS.url}."
        )
    noisy = _labels(values, f"noisy_{prefix}label", str(path))
    if len(noisy) != len(clean):
        raise DataError(
            f"{path}: there must be {len(clean)} human labels; got {len(noisy)}. "
            f"Get the file again from {sources.HUMAN_LABELS.url}."
        )
    check_labels(noisy, 100 if kind == "fine" else 20, f"{name}: human labels in {path}")
    return noisy
