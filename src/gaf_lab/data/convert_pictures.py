"""Pictures in folders of classes, and a Hugging Face dataset on disk, as arrays."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gaf_lab.data.arrays import Arrays, as_inputs, split
from gaf_lab.data.sources import DataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TESTS = ("test", "val", "valid", "validation")


def read_folders(folder: Path, size: int | None) -> Arrays:
    """The pictures (N, C, H, W) uint8 of FOLDER/CLASS/*, or FOLDER/train/CLASS/* and .../test.

    They have three channels, or one if all are grey.

    Args:
        folder: as above.
        size: height and width to scale to; None if all have the same size.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: must be a folder of pictures; it is not. Is the path right?")
    inner = {place.name: place for place in sorted(folder.iterdir()) if place.is_dir()}
    test = next((inner[name] for name in TESTS if name in inner and "train" in inner), None)
    first = inner["train"] if test is not None else folder
    classes = [place.name for place in sorted(first.iterdir()) if place.is_dir()]
    files, y = labelled_files(first, classes)
    if test is None:
        return Arrays(*split(stack(map(open_picture, files), size, folder), y), classes)
    others, other_y = labelled_files(test, classes)
    every = stack(map(open_picture, [*files, *others]), size, folder)
    return Arrays((every[: len(y)], y), (every[len(y) :], other_y), classes)


def labelled_files(folder: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """The pictures of each class, and their labels."""
    files, labels = [], []
    for label, name in enumerate(classes):
        inside = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
        found = [path for path in inside if path.suffix.lower() in PICTURE_SUFFIXES]
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(
            f"{folder}: must hold a folder of pictures for each class; it has none. "
            f"Put them into {folder}/CLASS/ ({', '.join(PICTURE_SUFFIXES)})."
        )
    return files, torch.tensor(labels)


def open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: must be a picture; {error}. Take it out.") from None


def stack(pictures: Iterable[Image.Image], size: int | None, source: Path) -> Tensor:
    """(N, C, H, W) uint8."""
    found = list(pictures)
    sizes = {picture.size for picture in found}
    if size is None and len(sizes) > 1:
        raise DataError(
            f"{source}: pictures must have one size; these have {len(sizes)}, such as "
            f"{' and '.join(f'{w} x {h}' for w, h in sorted(sizes)[:2])}. Give one with --size 64."
        )
    mode = "L" if all(picture.mode in ("L", "1") for picture in found) else "RGB"
    arrays = []
    for picture in found:
        scaled = picture.convert(mode)
        if size is not None and scaled.size != (size, size):
            scaled = scaled.resize((size, size), Image.Resampling.BILINEAR)
        arrays.append(np.atleast_3d(np.asarray(scaled)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def read_hugging_face(folder: Path, label: str | None, size: int | None) -> Arrays:
    """A dataset that `save_to_disk` wrote: a column of pictures or numbers, and one of labels.

    label: the column of labels; None for the only one of the type ClassLabel.
    """
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError:
        raise DataError(
            "hf: needs the package datasets, which is not installed. pip install datasets"
        ) from None
    found: Any = load_from_disk(str(folder))
    parts = {name: found[name] for name in found} if hasattr(found, "keys") else {"train": found}
    if "train" not in parts:
        raise DataError(f"{folder}: must have a split 'train'; it has {', '.join(parts)}.")
    train = parts["train"]
    label = label or label_column(train, folder)
    inputs = [name for name in train.column_names if name != label]
    names = getattr(train.features[label], "names", None) or []
    test = next((parts[name] for name in TESTS if name in parts), None)
    x, y = columns_of(train, inputs, label, size, folder)
    if test is None:
        return Arrays(*split(x, y), list(names))
    return Arrays((x, y), columns_of(test, inputs, label, size, folder), list(names))


def label_column(part: Any, folder: Path) -> str:
    found = [name for name, kind in part.features.items() if hasattr(kind, "names")]
    if len(found) != 1:
        raise DataError(
            f"{folder}: the column of labels must be known; {len(found)} are of type ClassLabel. "
            f"Give one of {', '.join(part.column_names)} with --label."
        )
    return str(found[0])


def columns_of(
    part: Any, inputs: list[str], label: str, size: int | None, folder: Path
) -> tuple[Tensor, Tensor]:
    """Inputs and labels; the inputs are one column of pictures, or columns of numbers."""
    first = part[0]
    pictures = [name for name in inputs if isinstance(first[name], Image.Image)]
    y = torch.tensor(part[label])
    if pictures:
        return stack((row[pictures[0]] for row in part), size, folder), y
    try:
        columns = [
            np.asarray(part[name], dtype=np.float32).reshape(len(part), -1) for name in inputs
        ]
    except (ValueError, TypeError):
        raise DataError(
            f"{folder}: inputs must be pictures or numbers; they are {', '.join(inputs)}. "
            "Write a task of your own (docs/your-task.md)."
        ) from None
    return as_inputs(np.concatenate(columns, 1)), y
