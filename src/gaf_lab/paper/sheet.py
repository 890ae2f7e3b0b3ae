"""The sheet of a figure: title and notes above, axes in rows and columns beneath."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gaf_lab.paper.items import Item
from gaf_lab.report.figures import canvas
from gaf_lab.report.palette import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETWEEN, BOTTOM = 0.62, 0.65  # inches between two rows, and beneath the last


def heading(item: Item) -> str:
    """ "Figure 6. Accuracy per noise level"; empty for an item without a title."""
    if not item.title:
        return ""
    word = "Table" if item.kind == "table" else "Figure"
    return f"{word} {''.join(c for c in item.id if c.isdigit())}. {item.title}"


def write_head(figure: "Figure", title: str, notes: Sequence[str]) -> None:
    """Writes title and notes at the top of the figure."""
    width, height = figure.get_size_inches()
    left = 0.2 / width
    figure.text(left, 1 - 0.2 / height, title, va="top", fontsize=13, fontweight="bold", color=INK)
    below = 0.52 if title else 0.2
    figure.text(
        left,
        1 - below / height,
        "\n".join(wrap(notes, width)),
        va="top",
        fontsize=8.5,
        color=SOFT,
        linespacing=1.35,
    )


def head_height(title: str, notes: Sequence[str], width: float) -> float:
    """Inches that title and notes take up in a figure of `width` inches."""
    lines = 0.165 * len(wrap(notes, width))
    if title:
        return 0.6 + lines
    return 0.2 + lines if notes else lines


def wrap(notes: Sequence[str], width: float) -> list[str]:
    """The notes as one paragraph, in lines that fit a figure of `width` inches."""
    return textwrap.wrap(" ".join(notes), int(15.5 * (width - 0.4)))


def sheet(
    item: Item,
    notes: Sequence[str],
    width: float,
    rows: Sequence[float],
    left: float,
    right: float,
    columns: int = 1,
) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of `width` inches with title and notes above, and its axes by row and column.

    The axes of row i are rows[i] inches high. Each has `left` inches at its left, and `right`
    inches for names at its right.
    """
    above = 0.4 if columns == 1 else 0.8  # columns have names
    top = head_height(heading(item), notes, width) + above
    height = top + sum(rows) + BETWEEN * (len(rows) - 1) + BOTTOM
    figure = canvas(width, height)
    write_head(figure, heading(item), notes)
    cell = width / columns
    axes = []
    for i, tall in enumerate(rows):
        y = height - top - sum(rows[: i + 1]) - BETWEEN * i
        boxes = [
            ((cell * j + left) / width, y / height, (cell - left - right) / width, tall / height)
            for j in range(columns)
        ]
        axes.append([figure.add_axes(box) for box in boxes])
    return figure, axes
