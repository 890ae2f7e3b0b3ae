"""The paper's table as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gaf_lab.paper.items import HUMAN_COLUMN, Item
from gaf_lab.paper.places import tick_texts
from gaf_lab.paper.sheet import head_height, heading, write_head
from gaf_lab.paper.table import TableRow, columns_not_run, table_blocks, table_columns
from gaf_lab.records.run import Run
from gaf_lab.report.figures import canvas
from gaf_lab.report.labels import shorten
from gaf_lab.report.palette import INK, SOFT, Shade, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = "Mean ± standard deviation over seeds; beneath a difference, its 95% interval."
LINE_HEIGHT = 0.3  # inches
LONGEST_NAME = 34  # characters


@dataclass(frozen=True)
class Grid:
    """The picture while it is drawn. Positions are inches from the left and from the top.

    Attributes:
        names: inches that the names of the lines take up.
        wide: inches of a column.
    """

    figure: "Figure"
    names: float
    wide: float
    colours: dict[str, Shade]

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        width, height = self.figure.get_size_inches()
        self.figure.text(x / width, 1 - y / height, text, va="center", parse_math=False, **style)

    def rule(self, y: float) -> None:
        """A line across the figure."""
        from matplotlib.lines import Line2D

        width, height = self.figure.get_size_inches()
        across, up = [0.2 / width, 1 - 0.2 / width], [1 - y / height] * 2
        self.figure.add_artist(Line2D(across, up, color=SOFT, linewidth=0.8))

    def centre(self, column: int) -> float:
        return self.names + self.wide * (column + 0.5)

    def write_row(self, y: float, row: TableRow) -> None:
        """A line whose top is at y."""
        middle = y + row_height(row) / 2
        colour = INK if row.arm is None else self.colours[row.arm].light
        self.write(0.2, middle, mark_of(row), fontsize=10, color=colour)
        ink = SOFT if row.paper else INK
        self.write(0.42, middle, shorten(row.name, LONGEST_NAME), fontsize=9.5, color=ink)
        for column, (value, beneath) in enumerate(row.cells):
            self.write_cell(column, y, row, value, beneath)

    def write_cell(self, column: int, y: float, row: TableRow, value: str, beneath: str) -> None:
        """The value, and beside it its deviation; of a difference, beneath it its interval."""
        x, tall, stacked = self.centre(column), row_height(row), row.arm is None and beneath
        style: dict[str, Any] = {"ha": "center", "color": SOFT if row.paper else INK}
        if not stacked:
            self.write(x, y + tall * 0.5, f"{value} {beneath}".strip(), fontsize=9.5, **style)
            return
        self.write(x, y + tall * 0.32, value, fontsize=9.5, **style)
        self.write(x, y + tall * 0.72, beneath, ha="center", fontsize=7, color=SOFT)


def draw_table(item: Item, runs: list[Run], notes: Sequence[str]) -> "Figure":
    columns, blocks = tick_texts(item, table_columns(item, runs)), table_blocks(item, runs)
    rows = [row for _, block in blocks for row in block]
    lengths = [len(shorten(row.name, LONGEST_NAME)) for row in rows]
    names = max([12, *lengths]) * 0.083 + 0.45
    width = max(8.0, names + 0.92 * len(columns) + 0.2)
    all_notes = [*notes, *columns_not_run(item, runs), CELLS]
    top = head_height(heading(item), all_notes, width) + 0.5
    height = top + sum(block_height(block) for _, block in blocks) + 0.2
    figure = canvas(width, height)
    write_head(figure, heading(item), all_notes)
    colours = palette([*dict.fromkeys(row.arm for row in rows if row.arm)])
    grid = Grid(figure, names, (width - names - 0.3) / len(columns), colours)
    for j, text in enumerate(columns):
        head = text if text == HUMAN_COLUMN else f"{text}%"
        grid.write(grid.centre(j), top - 0.18, head, ha="center", fontsize=9.5, color=SOFT)
    grid.write(0.2, top - 0.18, "label error", fontsize=9.5, color=SOFT)
    draw_blocks(grid, top, blocks)
    return figure


def draw_blocks(grid: Grid, top: float, blocks: list[tuple[str, list[TableRow]]]) -> None:
    y = top
    for label, rows in blocks:
        grid.rule(y)
        style: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": INK}
        grid.write(0.2, y + LINE_HEIGHT * 0.75, label, **style)
        y += LINE_HEIGHT * 1.4
        for row in rows:
            grid.write_row(y, row)
            y += row_height(row)
        y += LINE_HEIGHT * 0.2


def mark_of(row: TableRow) -> str:
    if row.paper:
        return "◇"
    return "●" if row.arm else ""


def row_height(row: TableRow) -> float:
    return LINE_HEIGHT * (1.35 if row.arm is None else 1)


def block_height(rows: list[TableRow]) -> float:
    """With its heading, and the space beneath."""
    return LINE_HEIGHT * (1.6 + sum(1.35 if row.arm is None else 1 for row in rows))
