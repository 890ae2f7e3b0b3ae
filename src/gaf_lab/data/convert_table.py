"""A table in a CSV file as arrays: a column of targets, and all others as inputs."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gaf_lab.data.arrays import Arrays, split
from gaf_lab.data.sources import DataError
from gaf_lab.settings.checks import nearest

MOST_KINDS = 100  # different words in a column of inputs
MOST_CLASSES = 1000
ByLine = dict[int, str]  # by line number
Lines = dict[int, list[str]]
# thousands or decimals behind a comma, a point, a blank or an apostrophe; money, shares
OTHERWISE_WRITTEN = re.compile(
    r"[-+]?[$€£¥]?[-+]?\s?(\d{1,3}([ ,.'\u2019\u00a0\u202f]\d{3})+|\d+)([.,]\d+)?\s?[%$€£¥]?"
)
MISSING = ("", "na", "nan", "n/a", "<na>", "?")


def read_table(path: Path, label: str | None, numbers: bool = False) -> Arrays:
    """The table of a CSV file with a line of column names.

    Columns of numbers are scaled to mean 0 and deviation 1 over the training samples; a column of
    words becomes a column of 0 and 1 for each word. The targets are classes if they are words or
    whole numbers, else numbers. A sample's name is its line, "line 2" for the first.

    Args:
        path: of the file.
        label: the name of the column of targets; None for the last column.
        numbers: the targets are numbers, although all may be whole.

    Raises:
        DataError: if it is no such table, or a value is missing.
    """
    names, table = read_rows(path)
    label = names[-1] if label is None else label
    if label not in names:
        raise DataError(
            f"{path}: label must be a column; got {label!r}.{nearest(label, names)} "
            f"Columns: {', '.join(names)}."
        )
    columns = {
        name: {number: row[i] for number, row in table.items()} for i, name in enumerate(names)
    }
    check_filled(path, columns)
    targets = columns.pop(label)
    if not columns:
        raise DataError(f"{path}: must have a column beside {label!r}; it has none.")
    x = torch.cat([as_columns(path, name, values) for name, values in columns.items()], 1)
    y, classes = as_labels(path, label, targets, numbers)
    found = split(x, y, classes, [f"line {number}" for number in table])
    mean, deviation = found.train[0].mean(0), found.train[0].std(0, unbiased=False)
    scale = torch.where(deviation > 0, deviation, 1.0)
    train, test = (((part - mean) / scale, y) for part, y in (found.train, found.test))
    return dataclasses.replace(found, train=train, test=test)


def read_rows(path: Path) -> tuple[list[str], Lines]:
    """The column names and the rows of a CSV file by line number; its separator is found."""
    if not path.is_file():
        raise DataError(f"{path}: must be a CSV file; it is not there. Is the path right?")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be text in UTF-8; {error}. Save it in UTF-8.") from None
    separator = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    table: Lines = {}
    number = 1
    for row in reader:
        if row:
            table[number] = [value.strip() for value in row]
        number = reader.line_num + 1
    if len(table) < 2:
        raise DataError(
            f"{path}: must have a line of column names and rows beneath it; "
            f"it has {len(table)} lines. Is it a CSV file?"
        )
    names = table.pop(min(table))
    for number, row in table.items():
        if len(row) != len(names):
            raise DataError(
                f"{path}: every line must have {len(names)} values, as the first one names them; "
                f"line {number} has {len(row)}. Is a separator inside a value?"
            )
    check_header(path, names)
    return names, table


def check_header(path: Path, names: list[str]) -> None:
    """Refuses a first line that holds values, and two columns of one name."""
    double = {name for name in names if names.count(name) > 1}
    if double or as_numbers(names) is not None:
        raise DataError(
            f"{path}: the first line must name the columns, each differently; "
            f"it is {', '.join(names[:5])}. Write names there."
        )


def check_filled(path: Path, columns: dict[str, ByLine]) -> None:
    for name, values in columns.items():
        missing = [number for number, value in values.items() if value.lower() in MISSING]
        if missing:
            raise DataError(
                f"{path}: every value must be there; column {name!r} lacks {len(missing)}, "
                f"the first in line {missing[0]}. Leave out such lines or the column."
            )


def as_numbers(values: Iterable[str]) -> list[float] | None:
    """The values as finite numbers; None if one is none."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def as_columns(path: Path, name: str, values: ByLine) -> Tensor:
    """(N, columns) float32."""
    numbers = as_numbers(values.values())
    if numbers is not None:
        return torch.tensor(numbers)[:, None]
    check_written(path, name, values)
    check_kind(path, name, values)
    words, places = np.unique(list(values.values()), return_inverse=True)
    if len(words) > MOST_KINDS:
        raise DataError(
            f"{path}: a column of words must have at most {MOST_KINDS} different ones; "
            f"{name!r} has {len(words):,}. Leave the column out."
        )
    return torch.eye(len(words))[torch.from_numpy(places)]


def check_written(path: Path, name: str, values: ByLine) -> None:
    """Refuses a column of numbers that are written otherwise than with a decimal point."""
    odd = [number for number, value in values.items() if as_numbers([value]) is None]
    if all(OTHERWISE_WRITTEN.fullmatch(values[number]) for number in odd):
        raise DataError(
            f"{path}: numbers must be written with digits and a decimal point alone; {name!r} has "
            f"{values[odd[0]]!r} in line {odd[0]}. Write them so, or put a letter before each if "
            "they are words."
        )


def check_kind(path: Path, name: str, values: ByLine) -> None:
    """Refuses a column that is mostly numbers: each of them would become a word."""
    others = [number for number, value in values.items() if as_numbers([value]) is None]
    if len(others) < len(values) / 2:
        raise DataError(
            f"{path}: a column must hold finite numbers or words; {name!r} is numbers but for "
            f"{len(others)}, the first {values[others[0]]!r} in line {others[0]}. "
            "Leave out such lines or the column."
        )


def as_labels(path: Path, name: str, targets: ByLine, predicted: bool) -> tuple[Tensor, list[str]]:
    """Classes and their names, or numbers and no names. predicted: they are numbers."""
    values = list(targets.values())
    numbers = as_numbers(values)
    if numbers is None:
        check_written(path, name, targets)
        if predicted:
            odd = next(number for number, value in targets.items() if as_numbers([value]) is None)
            raise DataError(
                f"{path}: labels must be finite numbers with --numbers; {name!r} has "
                f"{targets[odd]!r} in line {odd}. Leave --numbers out if they are classes."
            )
    elif predicted or any(number != round(number) for number in numbers):
        return torch.tensor(numbers), []
    kinds = sorted(set(values)) if numbers is None else sorted(set(values), key=float)
    if len(kinds) > MOST_CLASSES:
        raise DataError(
            f"{path}: the column of labels must have at most {MOST_CLASSES} classes; {name!r} has "
            f"{len(kinds):,}. Give --numbers if they are numbers to predict."
        )
    place = {kind: i for i, kind in enumerate(kinds)}
    return torch.tensor([place[value] for value in values]), kinds
