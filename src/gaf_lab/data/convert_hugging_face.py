"""A Hugging Face dataset on disk as arrays: a column of labels, and pictures or numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gaf_lab.data.arrays import Arrays, as_inputs, split
from gaf_lab.data.check_arrays import Tensors
from gaf_lab.data.convert_pictures import TESTS, stack
from gaf_lab.data.jpeg import upright
from gaf_lab.data.sources import DataError
from gaf_lab.settings.checks import nearest


def read_hugging_face(folder: Path, label: str | None, size: int | None) -> Arrays:
    """A dataset that `save_to_disk` wrote: a column of pictures or numbers, and one of labels.

    A sample's name is its row in its split, "row 0" for the first.

    Args:
        folder: that it was written to.
        label: the column of labels, which are classes, words or numbers; None for the only one of
            the type ClassLabel.
        size: of pictures, height and width to scale to; None if all have the same size.
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
    train, test = parts["train"], next((parts[name] for name in TESTS if name in parts), None)
    label = label_column(train, label, folder)
    classes = class_names(train, label, folder)
    x, y = columns_of(train, label, classes, size, folder)
    if test is None:
        return split(x, y, classes, row_names(train))
    tested = columns_of(test, label, classes, size, folder)
    return Arrays((x, y), tested, classes, (row_names(train), row_names(test)))


def row_names(part: Any) -> list[str]:
    return [f"row {i}" for i in range(len(part))]


def label_column(part: Any, label: str | None, folder: Path) -> str:
    names = list(part.column_names)
    if label is not None and label not in names:
        raise DataError(
            f"{folder}: label must be a column; got {label!r}.{nearest(label, names)} "
            f"Columns: {', '.join(names)}."
        )
    if label is not None:
        return label
    found = [name for name, kind in part.features.items() if hasattr(kind, "names")]
    if len(found) != 1:
        raise DataError(
            f"{folder}: the column of labels must be known; {len(found)} are of type ClassLabel. "
            f"Give one of {', '.join(names)} with --label."
        )
    return str(found[0])


def class_names(part: Any, label: str, folder: Path) -> list[str]:
    """The names of a ClassLabel's classes, or the words of a column of words; else none."""
    known = getattr(part.features[label], "names", None)
    if known:
        return list(known)
    values = list(part[label])
    if None in values:
        raise DataError(
            f"{folder}: every label must be there; that of row {values.index(None)} is not. "
            "Leave such rows out."
        )
    return sorted(set(values)) if all(isinstance(value, str) for value in values) else []


def read_labels(part: Any, label: str, classes: list[str], folder: Path) -> Tensor:
    """(N,): the number of each label's class, or numbers."""
    values = list(part[label])
    if not values or not isinstance(values[0], str):
        if {type(value) for value in values} <= {int, float, bool}:
            return torch.tensor(values)
        raise DataError(
            f"{folder}: labels must be classes, words or numbers, one for each row; those of "
            f"{label!r} are {part.features[label]}. Give another column with --label."
        )
    unknown = [i for i, value in enumerate(values) if value not in classes]
    if unknown:
        raise DataError(
            f"{folder}: labels must be classes of the training samples; that of row {unknown[0]}, "
            f"{values[unknown[0]]!r}, is none. Leave such rows out."
        )
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place[value] for value in values])


def columns_of(
    part: Any, label: str, classes: list[str], size: int | None, folder: Path
) -> Tensors:
    """Inputs and labels; the inputs are one column of pictures, or columns of numbers."""
    first, y = part[0], read_labels(part, label, classes, folder)
    inputs = [name for name in part.column_names if name != label]
    pictures = [name for name in inputs if isinstance(first[name], Image.Image)]
    if pictures:
        named = zip(row_names(part), (upright(row[pictures[0]]) for row in part), strict=True)
        return stack(named, size, folder), y
    try:
        columns = [
            np.asarray(part[name], dtype=np.float32).reshape(len(part), -1) for name in inputs
        ]
        return as_inputs(np.concatenate(columns, 1)), y
    except (ValueError, TypeError):
        raise DataError(
            f"{folder}: inputs must be pictures or numbers; they are {', '.join(inputs)}. "
            "Write a task of your own (docs/your-task.md)."
        ) from None
