"""Data of the user's own, checked: inputs and targets that can be trained and tested on."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data.sources import DataError

Tensors = tuple[Tensor, Tensor]
WAY_OUT = "Write a task of your own (docs/your-task.md)."


def check_numbers(x: Any, y: Any, name: str) -> None:
    """Refuses inputs that are no real numbers, and targets (N,) or (N, 1) that are none.

    Args:
        x: inputs of an .npz file.
        y: its targets.
        name: of the source, in messages.
    """
    if np.ndim(x) == 0 or np.asarray(x).dtype.kind not in "iufb":
        raise DataError(
            f"{name}: inputs must be real numbers, a row for each sample; "
            f"got {np.shape(x)} of {np.asarray(x).dtype}. {WAY_OUT}"
        )
    shape, kind = np.shape(y), np.asarray(y).dtype.kind
    if len(shape) == 0 or any(size != 1 for size in shape[1:]) or kind not in "iufb":
        raise DataError(
            f"{name}: targets must be one number for each sample; "
            f"got {shape} of {np.asarray(y).dtype}. {WAY_OUT}"
        )
    if len(x) != len(y):
        raise DataError(
            f"{name}: must have a target for each input; "
            f"got {len(x)} inputs and {len(y)} targets. Is a sample in each row?"
        )


def check_arrays(train: Tensors, test: Tensors, name: str, classes: Sequence[str] = ()) -> None:
    """Refuses what cannot be trained and tested on.

    Args:
        train: inputs (N, ...) and targets (N,), int64 for classes.
        test: likewise.
        name: of the source, in messages.
        classes: their names, if they have any.
    """
    (x, y), (test_x, test_y) = train, test
    if not (len(y) and len(test_y)):
        raise DataError(
            f"{name}: must have samples to train on and to test on; it has {len(y)} and "
            f"{len(test_y)}. A fifth of each class is split off for the test, so that one must "
            "have three samples. Give more, or a test set of its own."
        )
    check_inputs(x, name, "training")
    check_inputs(test_x, name, "test")
    if x.shape[1:] != test_x.shape[1:]:
        raise DataError(
            f"{name}: samples to test on must have the shape of those to train on, "
            f"{tuple(x.shape[1:])}; got {tuple(test_x.shape[1:])}. Make them alike."
        )
    lowest = min(int(y.min()), int(test_y.min()))
    if not y.is_floating_point() and (lowest < 0 or len(y.unique()) < 2):
        raise DataError(
            f"{name}: training samples must be of two classes at least, with numbers from 0 on; "
            f"got {name_classes(y.unique().tolist())}. Are these the labels?"
        )
    unknown = test_y[~torch.isin(test_y, y)]
    if not y.is_floating_point() and len(unknown):
        raise DataError(
            f"{name}: classes to test on must be among those to train on; {len(unknown)} test "
            f"samples are of others, the first of class {int(unknown[0])}. Leave them out, or add "
            "training samples."
        )
    if y.is_floating_point():
        return
    if not classes:
        count_by_labels(y, test_y, f"{name}: ")
    elif int(y.max()) >= len(classes):
        raise DataError(
            f"{name}: labels must be places in the list of the {len(classes):,} classes, from 0 "
            f"on; got {int(y.max())}. Name every class, or leave the names out."
        )


def count_by_labels(train: Tensor, test: Tensor, where: str = "") -> int:
    """The number of classes where nothing else says it: one more than the largest label.

    Args:
        train: labels of all training samples (N,) int64, none below 0.
        test: likewise.
        where: the file, with which messages begin; "" for those of a task.

    Raises:
        DataError: for more classes than training samples.

    Warns:
        of classes without a training sample.
    """
    found = train.unique()
    classes = max(int(found[-1]), int(test.max())) + 1
    if classes > max(len(train), 2):
        otherwise = "Targets that are no classes must be floats."
        if not where:
            otherwise = "For other targets return Problem(classes=0, loss=...)."
        raise DataError(
            f"{where}labels must be numbers of classes, from 0 on; they go up to {classes - 1:,} "
            f"for {len(train):,} training samples. Number the classes without gaps. {otherwise}"
        )
    if len(found) < classes:
        there = torch.zeros(classes, dtype=torch.bool)
        there[found.cpu()] = True
        warnings.warn(
            f"gaf: {where}{classes - len(found):,} of {classes:,} classes have no training sample, "
            f"the first is class {int((~there).int().argmax())}: the labels lie in "
            f"[{int(found[0])}, {classes - 1}], and the model has an output for each number from 0 "
            "on. Number the classes without gaps.",
            stacklevel=2,
        )
    return classes


def name_classes(labels: list[int]) -> str:
    """The first five of them."""
    if len(labels) == 1:
        return f"class {labels[0]} alone"
    return f"classes {', '.join(map(str, labels[:5]))}{', ...' if len(labels) > 5 else ''}"


def check_inputs(x: Tensor, name: str, part: str) -> None:
    if not x.is_floating_point() or x.isfinite().all():
        return
    wrong = (~x.isfinite().reshape(len(x), -1).all(1)).nonzero().flatten()
    raise DataError(
        f"{name}: inputs must be finite; {len(wrong)} of {len(x):,} {part} samples have NaN or "
        f"infinity, the first at place {int(wrong[0])} from 0. Leave them out, or fill them in."
    )
