"""Figures over training: a row for each panel, a column for each network and data set."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import chart_of, fit_chart, panels_with_values
from gaf_lab.paper.places import Position, arm_names, arms_by_position, paper_value
from gaf_lab.paper.sheet import sheet
from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm
from gaf_lab.report.cells import has_values
from gaf_lab.report.charts import Axis, Panel, fit_axis
from gaf_lab.report.figures import draw_arms, title_axes
from gaf_lab.report.labels import draw_taus, label_ends, margin
from gaf_lab.report.palette import CROWD, INK, SOFT, Shade, palette
from gaf_lab.report.statistics import curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(item: Item, runs: list[Run], notes: Sequence[str], axis: Axis) -> "Figure":
    """A row for each panel, a column for each network and data set; no axes without values."""
    groups, axis = arms_by_position(item, runs), fit_axis(axis, runs)
    panels = panels_with_values(item, runs)
    colours = palette(arm_names(item, runs))
    rows = [max(2.3, 0.2 * (len(colours) + 1))] * len(panels)
    columns = len(groups)
    width = 8.0 if columns == 1 else 5.0 * columns
    all_notes = [*notes, *notes_on_marks(item, len(colours))]
    figure, axes = sheet(item, all_notes, width, rows, 0.72, margin(list(colours)), columns)
    for column, (x, arms) in enumerate(groups.items()):
        for row, panel in enumerate(panels):
            if has_values(arms, panel):
                draw_panel(axes[row][column], item, x, arms, panel, axis, colours)
            else:
                axes[row][column].remove()
        axes[-1][column].set_xlabel(axis.label, fontsize=10.5, color=SOFT, labelpad=6)
        if columns > 1:
            name_column(figure, axes[0][column], str(x))
    return figure


def notes_on_marks(item: Item, arms: int) -> list[str]:
    notes = []
    if "test_accuracy" in item.keys and arms <= CROWD:
        notes.append("○: selected on noisy held-out labels.")
    if any(item.paper.values()):
        notes.append("◇: the paper's value.")
    return notes


def draw_panel(
    ax: "Axes",
    item: Item,
    x: Position,
    arms: list[Arm],
    panel: Panel,
    axis: Axis,
    colours: dict[str, Shade],
) -> None:
    """Draws the arms, the paper's values at their ends, and the names beside them."""
    chart = fit_chart(chart_of(item), panel)
    labels = draw_arms(ax, arms, panel, chart, axis, colours)
    title_axes(ax, panel.label, chart, arms)
    ax.set_title("", loc="right")
    for arm in arms:
        end = paper_end(item, arm, x, panel, axis)
        if end is not None:
            draw_paper_values(ax, [end[0]], [end[1]], colours[arm.name].light)
    if chart.thresholds:
        labels = labels + draw_taus(ax, arms, colours)
    label_ends(ax, labels)


def paper_end(
    item: Item, arm: Arm, x: Position, panel: Panel, axis: Axis
) -> tuple[float, float] | None:
    """The paper's value at the end of the arm's mean curve; None without one of them."""
    mean, value = curve(arm, panel.key, axis.key), paper_value(item, arm.name, x, panel.key)
    if mean is None or value is None:
        return None
    return float(mean.x[-1] / axis.unit), value * panel.factor


def name_column(figure: "Figure", top: "Axes", name: str) -> None:
    """Writes a column's name above its top axes."""
    above = top.get_position()
    y = above.y1 + 0.42 / figure.get_figheight()
    figure.text(above.x0, y, name, fontsize=11, fontweight="bold", color=INK)


def draw_paper_values(ax: "Axes", x: Sequence[Any], y: Sequence[float], colour: str) -> None:
    """Draws hollow diamonds of the arm's colour."""
    ax.plot(
        x,
        y,
        "D",
        markersize=6.5,
        markerfacecolor="none",
        markeredgecolor=colour,
        markeredgewidth=1.5,
        clip_on=False,
        zorder=7,
    )
