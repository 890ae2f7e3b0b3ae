"""ImageNet in its usual folder of JPEG files.

    DIR/train/n01440764/n01440764_10026.JPEG      DIR, or DIR/imagenet, or DIR/ILSVRC/Data/CLS-LOC
    DIR/val/n01440764/ILSVRC2012_val_00000293.JPEG

It is never in memory as a whole; see `gaf_lab.data.files`.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data.archives import check_folder
from gaf_lab.data.download import cache
from gaf_lab.data.files import Files
from gaf_lab.data.sources import DataError

# the archive of the Kaggle challenge unpacks to the last one
PLACES = ("", "imagenet", "ILSVRC/Data/CLS-LOC")
SUFFIXES = (".jpeg", ".jpg", ".png")
LAYOUT = "train/<class>/*.JPEG and val/<class>/*.JPEG"
# of its training pictures, rounded as usual
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def find_imagenet(
    folder: Path | None, size: int
) -> tuple[list[str], tuple[Files, Tensor], tuple[Files, Tensor]]:
    """The sorted classes, then files and labels (N,) int64 of the training and validation set.

    Args:
        folder: see `find_root`.
        size: height and width that pictures are scaled to.

    Raises:
        DataError: if the folder does not have the layout.
    """
    root = find_root(folder)
    classes, tested = folders_in(root / "train"), folders_in(root / "val")
    check_classes(root, classes, tested)
    return (
        classes,
        label_pictures(root / "train", classes, size),
        label_pictures(root / "val", classes, size),
    )


def find_root(folder: Path | None) -> Path:
    """The folder that holds train and val.

    Args:
        folder: the place to search: itself, imagenet in it, ILSVRC/Data/CLS-LOC in it.
            None: the cache (`gaf_lab.data.download.cache`).

    Raises:
        DataError: if there is none.
    """
    check_folder(folder)
    place = folder or cache()
    for candidate in (place / name for name in PLACES):
        there = [part for part in ("train", "val") if (candidate / part).is_dir()]
        if len(there) == 2:
            return candidate
        if there:
            missing = "val" if there == ["train"] else "train"
            raise DataError(
                f"imagenet: {candidate} must hold {LAYOUT}; it has {there[0]}, but no {missing}. "
                "Put that folder beside it."
            )
    raise DataError(
        f"imagenet: {place} must hold {LAYOUT}, in itself or in {' or '.join(PLACES[1:])}; "
        "it does not. It is not downloaded, because that needs an account at image-net.org: "
        "get it there, and give its folder with --data DIR."
    )


def check_classes(root: Path, classes: list[str], tested: list[str]) -> None:
    """DataError if a class folder is missing in train, or in val, or is only in val."""
    if not classes:
        raise DataError(
            f"imagenet: {root / 'train'} must hold a folder for each class; it holds none. "
            "Unpack the classes' archives, each into a folder of its name."
        )
    if not tested:
        flat = len(pictures_in(root / "val"))
        raise DataError(
            f"imagenet: {root / 'val'} must hold a folder for each class; it holds none, "
            f"and {flat} pictures, as downloaded. Move each picture into the folder of its class: "
            "docs/imagenet.md has the command."
        )
    if unknown := sorted(set(tested) - set(classes)):
        raise DataError(
            f"imagenet: every class in {root / 'val'} must be in {root / 'train'}; "
            f"{len(unknown)} of {len(tested)} are not, {unknown[0]} for one. "
            "Are both of the same ImageNet, and whole?"
        )


def label_pictures(folder: Path, classes: list[str], size: int) -> tuple[Files, Tensor]:
    """The pictures of the class folders in `folder`, by class and name, and labels (N,) int64.

    Labels are places in `classes`.

    Raises:
        DataError: for a class folder without a picture.
    """
    names, counts = [], []
    for wnid in classes:
        found = pictures_in(folder / wnid) if (folder / wnid).is_dir() else []
        if not found and (folder / wnid).is_dir():
            raise DataError(
                f"imagenet: class folder {folder / wnid} must hold a picture "
                f"({', '.join(SUFFIXES)}); it holds none. "
                "Unpack its archive again, or remove the folder."
            )
        names += [os.fsencode(f"{wnid}/{name}") for name in found]
        counts.append(len(found))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Files(folder, np.array(names), size), labels


def folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def pictures_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return sorted(n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith("."))
