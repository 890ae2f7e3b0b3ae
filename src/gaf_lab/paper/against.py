"""Figures against a field of the config: means as lines, seeds as dots, the paper as diamonds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gaf_lab.paper.curves import draw_paper_values
from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import ACROSS, measure_title, measures_with_values
from gaf_lab.paper.places import Position, arm_names, axis_positions, tick_texts
from gaf_lab.paper.series import Series, all_series
from gaf_lab.paper.sheet import sheet
from gaf_lab.records.run import Run
from gaf_lab.report.figures import level, plain_axes
from gaf_lab.report.labels import Label, label_ends, margin, short_names
from gaf_lab.report.palette import INK, SOFT, Shade, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = "◇ paper   ● mean over seeds   · one seed"


def draw_against(item: Item, runs: list[Run], notes: Sequence[str]) -> "Figure":
    """A panel for each measure, one beneath the other; the first has the key of the marks."""
    at, rows = axis_positions(item, runs), measures_with_values(item, runs)
    colours = palette(arm_names(item, runs))
    tall = max(2.3, 0.2 * (len(colours) + 1))
    figure, grid = sheet(item, notes, 8.0, [tall] * len(rows), 0.72, margin(list(colours)))
    axes = [ax for (ax,) in grid]
    labels = []
    for ax, (key, measure) in zip(axes, rows, strict=True):
        labels.append(draw_measure(ax, all_series(item, runs, key, measure), at, colours))
    level([ax for ax, (_, measure) in zip(axes, rows, strict=True) if measure.unit == "share"])
    for ax, (key, measure), ends in zip(axes, rows, labels, strict=True):
        plain_axes(ax)
        ax.set_title(measure_title(key, measure), loc="left", fontsize=11, color=INK, pad=8)
        if ax is axes[0]:
            marks = KEY if any(item.paper.values()) else KEY.partition("   ")[2]
            ax.set_title(marks, loc="right", fontsize=9, color=SOFT, pad=8)
        ax.set_xticks(list(at.values()), tick_texts(item, at))
        label_ends(ax, ends)
    axes[-1].set_xlabel(ACROSS[item.x or ""], fontsize=10.5, color=SOFT, labelpad=6)
    return figure


def draw_measure(
    ax: "Axes", found: list[Series], at: dict[Position, float], colours: dict[str, Shade]
) -> list[Label]:
    """Draws every arm. Returns the names for the lines' ends."""
    short = short_names([*colours])
    labels = [draw_series(ax, one, at, short[one.arm], colours[one.arm].light) for one in found]
    return [label for label in labels if label is not None]


def draw_series(
    ax: "Axes", one: Series, at: dict[Position, float], name: str, colour: str
) -> Label | None:
    """Draws an arm along the axis. Returns its name for the line's end; None without a value."""
    draw_paper_values(ax, [at[x] for x, _ in one.paper], [value for _, value in one.paper], colour)
    ax.plot(
        [at[x] for x, _ in one.dots],
        [value for _, value in one.dots],
        "o",
        markersize=3,
        color=colour,
        alpha=0.35,
        zorder=3,
    )
    if not one.mean:
        return None
    x, y = [at[x] for x, *_ in one.mean], [mean for _, mean, *_ in one.mean]
    ax.plot(x, y, "-o", color=colour, linewidth=2.2, markersize=5, solid_capstyle="round", zorder=4)
    if one.everywhere:
        ax.axhline(y[0], color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    return Label(None if one.everywhere else x[-1], y[-1], name, colour)
