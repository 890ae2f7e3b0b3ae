"""The paper's figures, drawn from runs as PNG. `interactive.py` draws the same for the page.

Of each arm: the mean over seeds as a line, single seeds as faint dots, and the values that the
paper prints as hollow diamonds of the arm's colour.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaf_lab.paper.against import draw_against
from gaf_lab.paper.curves import draw_curves
from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import chart_of, measures_with_values, panels_with_values
from gaf_lab.paper.sheet import head_height, heading, write_head
from gaf_lab.paper.table_picture import draw_table
from gaf_lab.records.run import Run
from gaf_lab.report.charts import SAMPLES, Axis
from gaf_lab.report.figures import DPI, canvas
from gaf_lab.report.palette import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_RUNS = "No run of this figure was finished."


def save_figure(item: Item, runs: list[Run], out: Path, notes: Sequence[str] = ()) -> Path:
    """Writes `fig1.png` (150 dpi) into the folder `out`, and returns its path.

    For accuracy over training, also `fig1-steps.png` and `fig1-time.png`.

    notes: sentences that are printed beneath the title: scale, data, seeds.
    """
    out.mkdir(parents=True, exist_ok=True)
    chart = chart_of(item)
    for axis in chart.axes:
        draw_item(item, runs, notes, axis).savefig(out / f"{chart.stem(axis)}.png", dpi=DPI)
    return out / f"{item.id}.png"


def page_png(item: Item, runs: list[Run], axis: Axis = SAMPLES) -> bytes:
    """The PNG for a page, without title and notes, which the page has itself."""
    png = io.BytesIO()
    draw_item(dataclasses.replace(item, title=""), runs, (), axis).savefig(png, dpi=DPI)
    return png.getvalue()


def draw_item(
    item: Item, runs: list[Run], notes: Sequence[str] = (), axis: Axis = SAMPLES
) -> "Figure":
    """The item as a matplotlib figure on a white ground."""
    if item.kind == "plane":
        from gaf_lab.paper.plane import draw_plane  # it imports torch

        return draw_plane(item, notes)
    if not has_anything(item, runs):
        return draw_nothing(item, notes)
    if item.kind == "table":
        return draw_table(item, runs, notes)
    if item.kind == "curves":
        return draw_curves(item, runs, notes, axis)
    return draw_against(item, runs, notes)


def has_anything(item: Item, runs: list[Run]) -> bool:
    """Whether the runs have a value for any panel of the item."""
    if item.kind == "curves":
        return any(panels_with_values(item, runs))
    if item.kind == "against":
        return bool(measures_with_values(item, runs))
    return bool(runs)


def draw_nothing(item: Item, notes: Sequence[str]) -> "Figure":
    """A sheet with title and notes, and a sentence in place of the figure."""
    below = head_height(heading(item), notes, 8.0) + 0.15
    height = below + 0.45
    figure = canvas(8.0, height)
    write_head(figure, heading(item), notes)
    figure.text(0.2 / 8.0, 1 - below / height, NO_RUNS, va="top", fontsize=11, color=INK)
    return figure
