"""Data of the user's own as arrays: an .npz file that `gaf data --from` writes and tasks read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data.check_arrays import Tensors, check_arrays, check_numbers
from gaf_lab.data.sampling import generator
from gaf_lab.data.sources import DataError

SPLIT_OFF = 0.2  # of each class, where the data have no test set of their own
SPLIT_NAMES = ("x_train", "y_train", "x_test", "y_test")
ONE_PART = ("x", "y")
SAMPLE_NAMES = ("names_train", "names_test")
CHANNELS = (1, 3)  # of a picture
Names = tuple[list[str], list[str]]


@dataclass(frozen=True, eq=False)
class Arrays:
    """Inputs and targets to train and test on.

    Attributes:
        train, test: inputs (N, ...) and targets (N,): int64 for classes, float32 for numbers.
        classes: their names, in the order of their numbers; empty for numbers.
        names: of the training and of the test samples, such as a file's path in the folder or a
            table's "line 7"; empty if they have none.
    """

    train: Tensors
    test: Tensors
    classes: list[str]
    names: Names = ([], [])


def read_arrays(path: Path | None) -> Arrays:
    """The arrays of an .npz file.

    It has x_train, y_train, x_test and y_test, or x and y, of which a fifth is split off for the
    test. Targets that are whole numbers are classes.

    Raises:
        DataError: if the file is missing or has other arrays.
    """
    if path is None:
        raise DataError("data must be an .npz file; got none. Give it with --data FILE.")
    if not is_zipfile(path):
        seen = "it is none" if path.is_file() else "it is not there"
        raise DataError(
            f"data {path}: must be an .npz file; {'it is a folder' if path.is_dir() else seen}. "
            "gaf data --from folder:DIR (or csv:FILE, hf:DIR) --out FILE.npz writes one."
        )
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise DataError(
            f"data {path}: must be an .npz file of plain arrays; {str(error).rstrip('.')}."
        ) from None
    return from_arrays(arrays, str(path))


def from_arrays(arrays: dict[str, Any], name: str) -> Arrays:
    """name: of the file, in messages."""
    classes = [str(label) for label in arrays.get("classes", ())]
    train_names, test_names = ([str(each) for each in arrays.get(key, ())] for key in SAMPLE_NAMES)
    if all(key in arrays for key in SPLIT_NAMES):
        x, y, other_x, other_y = (arrays[key] for key in SPLIT_NAMES)
        parts = as_pair(x, y, name), as_pair(other_x, other_y, name)
        found = Arrays(*parts, classes, (train_names, test_names))
    elif all(key in arrays for key in ONE_PART):
        found = split(*as_pair(arrays["x"], arrays["y"], name), classes)
    else:
        raise DataError(
            f"{name}: must hold arrays x and y, or {', '.join(SPLIT_NAMES)}; "
            f"it has {', '.join(arrays) or 'none'}. numpy.savez(FILE, x=..., y=...) writes them."
        )
    check_arrays(found.train, found.test, name, classes)
    return found


def as_pair(x: Any, y: Any, name: str) -> Tensors:
    """Inputs, and targets (N,): those of a whole-number type are classes, int64, else float32."""
    check_numbers(x, y, name)
    targets = torch.from_numpy(np.ascontiguousarray(y)).reshape(-1)
    return as_inputs(x), targets.float() if targets.is_floating_point() else targets.long()


def as_inputs(x: Any) -> Tensor:
    """Bytes as they are or as pictures, whole numbers as int64, other numbers as float32."""
    found = torch.from_numpy(np.ascontiguousarray(x))
    if found.dtype == torch.uint8:
        return as_pictures(found)
    return found.float() if found.is_floating_point() else found.long()


def as_pictures(x: Tensor) -> Tensor:
    """(N, H, W) and (N, H, W, C) as (N, C, H, W); bytes of another shape as they are."""
    if x.dim() == 3:
        return x[:, None]
    last = x.dim() == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS
    return x.permute(0, 3, 1, 2).contiguous() if last else x


def split(x: Tensor, y: Tensor, classes: list[str], names: Sequence[str] = ()) -> Arrays:
    """A fifth for the test, of each class if there are classes; always the same."""
    draw, test = generator(0, "test set"), torch.zeros(len(y), dtype=torch.bool)
    groups = y.unique().tolist() if not y.is_floating_point() else [None]
    for label in groups:
        members = torch.arange(len(y)) if label is None else (y == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=draw)
        test[members[order[: round(len(members) * SPLIT_OFF)]]] = True
    named: Names = ([], [])
    for name, tested in zip(names, test.tolist(), strict=False):
        named[tested].append(name)
    return Arrays((x[~test], y[~test]), (x[test], y[test]), classes, named)


def write_arrays(found: Arrays, path: Path) -> None:
    """Writes what `read_arrays` reads."""
    (x, y), (test_x, test_y) = found.train, found.test
    content: dict[str, Any] = dict(
        zip(SPLIT_NAMES, (x.numpy(), y.numpy(), test_x.numpy(), test_y.numpy()), strict=True)
    )
    for key, words in zip(("classes", *SAMPLE_NAMES), (found.classes, *found.names), strict=True):
        content[key] = np.array(words, dtype=np.str_)
    with path.open("wb") as file:
        np.savez(file, **content)


def describe_arrays(found: Arrays) -> dict[str, str]:
    """Facts, by name, as text."""
    (x, y), (_, test_y) = found.train, found.test
    facts = {
        "inputs": f"{' x '.join(map(str, x.shape[1:])) or 'one number'}, {str(x.dtype)[6:]}",
        "training samples": f"{len(y):,}",
        "test samples": f"{len(test_y):,}",
    }
    if found.names[0]:
        facts["names"] = f"{', '.join(found.names[0][:2])}, ..."
    if y.is_floating_point():
        return facts | {"targets": f"numbers, {float(y.min()):.4g} to {float(y.max()):.4g}"}
    counts = torch.bincount(y, minlength=len(found.classes)).tolist()
    names = found.classes or [str(label) for label in range(len(counts))]
    each = [f"{name}: {count:,}" for name, count in zip(names, counts, strict=False)]
    shown = ", ".join(each[:10]) + (", ..." if len(each) > 10 else "")
    return facts | {"classes": f"{len(counts)} ({shown})"}
