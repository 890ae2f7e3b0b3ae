"""The figures of a report as PNG, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaf_lab.progress import Tell, silent
from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, is_gaf
from gaf_lab.report.cells import (
    axes_with_values,
    cells_of,
    charts_with_values,
    names_in,
    selected_point,
    single_runs,
    taus_of,
    track,
)
from gaf_lab.report.charts import CHARTS, SAMPLES, Axis, Chart, Panel, fit_axis
from gaf_lab.report.labels import LINE, Label, draw_taus, label_ends, margin, short_names
from gaf_lab.report.measures import status
from gaf_lab.report.palette import CROWD, GRID, INK, SOFT, Shade, palette
from gaf_lab.report.statistics import curve

if TYPE_CHECKING:  # importing them takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def write_figures(runs: list[Run], out: Path, tell: Tell = silent) -> dict[str, Path]:
    """Writes the pictures of all charts (150 dpi) into the folder `out`.

    tell: called with what is being done, a picture's number, and how many there are.
    Returns the paths by `Chart.stem`.
    """
    out.mkdir(parents=True, exist_ok=True)
    views = [
        (chart, axis)
        for chart in charts_with_values(runs)
        for axis in axes_with_values(runs, chart)
    ]
    paths = {}
    for chart in CHARTS:  # those of an earlier report on other runs
        for axis in chart.axes:
            (out / f"{chart.stem(axis)}.png").unlink(missing_ok=True)
    for number, (chart, axis) in enumerate(views, 1):
        tell("drawing", number, len(views))
        paths[chart.stem(axis)] = path = out / f"{chart.stem(axis)}.png"
        draw_chart(runs, chart, axis).savefig(path, dpi=DPI)
    return paths


def canvas(width: float, height: float) -> "Figure":
    """An empty figure on a white ground, in inches, apart from matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def draw_chart(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> "Figure":
    """The chart's values against the axis. Panels of many arms are taller, for the arms' names."""
    found, axis = cells_of(runs, chart, axis), fit_axis(axis, runs)
    names = names_in(found)
    colours = palette(names)
    rows = [max(2.75, LINE * (len(cell.arms) + len(taus_of(chart, cell)) + 1)) for cell in found]
    figure, axes = stack_rows(8.0, rows, 0.68, margin(names))
    drawn = [
        draw_arms(ax, cell.arms, cell.panel, chart, axis, colours)
        for ax, cell in zip(axes, found, strict=True)
    ]
    for ax, cell, ends in zip(axes, found, drawn, strict=True):
        title_axes(ax, cell.title, chart, cell.arms)
        if taus_of(chart, cell):
            ends += draw_taus(ax, cell.arms, colours)
    if chart.zero:
        level(axes)
    for ax, ends in zip(axes, drawn, strict=True):
        label_ends(ax, ends)
    for ax in axes[-1:]:
        ax.set_xlabel(axis.label, fontsize=10.5, color=SOFT, labelpad=6)
    return figure


def level(axes: "Sequence[Axes]") -> None:
    """Gives all the same y range, so that heights can be compared."""
    ends = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def stack_rows(
    width: float, rows: Sequence[float], left: float, right: float
) -> tuple["Figure", list["Axes"]]:
    """A figure of `width` inches with axes one beneath the other, which share x.

    The axes of row i are rows[i] inches high.
    """
    top, between, bottom = 0.5, 0.75, 0.65
    height = top + sum(rows) + between * (len(rows) - 1) + bottom
    figure = canvas(width, height)
    axes: list[Axes] = []
    for i, tall in enumerate(rows):
        y = height - top - sum(rows[: i + 1]) - between * i
        box = (left / width, y / height, 1 - (left + right) / width, tall / height)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
    return figure, axes


def draw_arms(
    ax: "Axes", of: list[Arm], panel: Panel, chart: Chart, axis: Axis, colours: dict[str, Shade]
) -> list["Label"]:
    """Draws every arm. Returns the names for the lines' ends."""
    short = short_names([*colours])
    ends = []
    for arm in of:
        colour = colours[arm.name].light
        end = draw_arm(ax, arm, of, panel, chart, axis, colour)
        if end is not None:
            ends.append(Label(*end, short[arm.name], colour))
    return ends


def draw_arm(
    ax: "Axes", arm: Arm, of: list[Arm], panel: Panel, chart: Chart, axis: Axis, colour: str
) -> tuple[float, float] | None:
    """Draws an arm's runs and their mean. Returns its last point; None without any."""
    z = 4.0 if is_gaf(arm) else 3.0
    end = None
    mean = curve(arm, panel.key, axis.key)
    for run in single_runs(arm, of, mean):
        x, y = track(run, panel, axis)
        if not x.size:
            continue
        dashed = status(run) != "finished"
        ax.plot(
            x,
            y,
            color=colour,
            linewidth=0.9,
            alpha=0.5,
            linestyle=(0, (4, 2)) if dashed else "-",
            zorder=z - 1,
        )
        end = float(x[-1]), float(y[-1])
    if mean is not None:
        thick = 2.4 if len(of) <= CROWD else 1.8
        ax.plot(
            mean.x / axis.unit,
            mean.mean * panel.factor,
            color=colour,
            linewidth=thick,
            solid_capstyle="round",
            zorder=z,
        )
        end = float(mean.x[-1] / axis.unit), float(mean.mean[-1] * panel.factor)
    spots = [
        spot
        for run in single_runs(arm, of, mean)
        if chart.marks and (spot := selected_point(run, panel, axis))
    ]
    if spots:
        across, up = zip(*spots, strict=True)
        ax.scatter(
            across, up, s=34, facecolors="white", edgecolors=colour, linewidths=1.6, zorder=6
        )
    return end


def title_axes(ax: "Axes", title: str, chart: Chart, of: list[Arm]) -> None:
    """Names the quantity above the axes, which keep horizontal lines only."""
    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    if chart.marks and len(of) <= CROWD:
        ax.set_title(
            "○ selected on noisy held-out labels", loc="right", fontsize=9, color=SOFT, pad=8
        )
    plain_axes(ax)
    if chart.zero:
        ax.set_ylim(bottom=0)


def plain_axes(ax: "Axes") -> None:
    """Keeps a line beneath, soft numbers, and horizontal grid lines only."""
    from matplotlib.ticker import FuncFormatter

    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(SOFT)
    ax.tick_params(colors=SOFT, labelsize=10, length=0, pad=6)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.015)
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}")
    )
