"""The figures of a report, as PNG (matplotlib) and interactive (plotly), both drawn from the same description of the runs.

Thin lines are single runs, bold ones the mean over an arm's seeds; runs that are not finished are dashed. Where there are
more than CROWD arms, single runs are left out. Each point of a grid, such as a noise rate, has a panel of its own, and what nobody
recorded has none. Colours belong to methods, on every page the same: averaging grey, GAF and its variants blue, controls warm,
other methods green and violet.
"""

import dataclasses
import html
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaf_lab.progress import Tell, silent
from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, group_by_arm, group_by_point, is_gaf, point_names
from gaf_lab.report.measures import PAIR_DISTANCE, last_value, selected_evaluation, status
from gaf_lab.report.statistics import Curve, Values, curve, values_along

if TYPE_CHECKING:  # importing them takes a second, and a terminal table needs neither
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MOST = 400  # points of a line in the page
CROWD = 8  # arms: with more, single runs would hide the means
INK, SOFT, GRID = "#1b1d21", "#5c6370", "#e6e7ea"


class Shade(NamedTuple):
    """A colour on a light and on a dark ground."""

    light: str
    dark: str


KNOWN = {
    "averaging": Shade("#808080", "#9a9a9a"),
    "averaging, AdamW": Shade("#3f3f3f", "#dedede"),
    "averaging, scaled rate": Shade("#a9744a", "#8a5a33"),
    "GAF": Shade("#1559c9", "#4f93ff"),
    "GAF, start best": Shade("#2aa7c4", "#49c0d9"),
    "GAF, start worst": Shade("#0b2a6b", "#2b4fc4"),
    "GAF, halving": Shade("#79a8f5", "#a9c4ff"),
    "GAF, per bucket": Shade("#5b6fa8", "#7183bd"),
    "GAF, k = 4": Shade("#006b8f", "#1787a8"),
    "GAF, k = 2": Shade("#86d3f2", "#9fe4f7"),
    "GAF, AdamW": Shade("#4a35d9", "#7a6bff"),
    "random subset": Shade("#e0561b", "#f2672a"),
    "replay skip": Shade("#e2a800", "#ffd166"),
    "random skip": Shade("#8c1d4f", "#b8336f"),
    "early stopping": Shade("#7a7a12", "#a8a52a"),
    "EMA of weights": Shade("#2f9e63", "#3ecf85"),
    "label smoothing": Shade("#0f5a3c", "#17805a"),
    "GCE": Shade("#8fbf26", "#c3ea5b"),
    "ELR": Shade("#7a1fa8", "#9a35cf"),
    "mixup": Shade("#a86be0", "#c08cff"),
    "SAM": Shade("#d99bea", "#f6b8ff"),
    "larger batch": Shade("#c22fa0", "#ee5ac8"),
}
SPREAD = 150  # degrees of hue that a method's variants take up
# from linear sRGB to cones, from their cube roots to OKLab: bottosson.github.io/posts/oklab
CONES = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
         (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
OPPONENTS = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
             (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip


class Axis(NamedTuple):
    """What runs along: a key of the evaluations, its name, its label, how much of it is 1 there, and what the page says over a point."""

    key: str
    name: str
    label: str
    unit: float
    hover: str


SAMPLES = Axis(
    "samples", "samples seen", "samples seen (thousands)", 1000.0, "%{x:,.1f} thousand samples"
)
STEPS = Axis("steps_taken", "steps taken", "steps taken", 1.0, "%{x:,.0f} steps taken")
TIME = Axis("seconds", "time", "time (s)", 1.0, "%{x:,.1f} s")


def clock(longest: float) -> tuple[str, float]:
    """The unit of time that suits the longest of some times in seconds, and its length in seconds."""
    return ("s", 1.0) if longest < 120 else ("min", 60.0) if longest < 7200 else ("h", 3600.0)


def fitted(axis: Axis, runs: list[Run]) -> Axis:
    """The axis; that of time in the unit that suits these runs."""
    if axis.key != TIME.key:
        return axis
    unit, second = clock(max((last_value(run, axis.key) or 0.0 for run in runs), default=0.0))
    return axis._replace(label=f"time ({unit})", unit=second, hover=f"%{{x:,.1f}} {unit}")


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a key of the evaluations, multiplied by `factor`, with its unit in the label."""

    key: str
    label: str
    factor: float
    unit: str
    digits: int


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        axes: what its values are drawn against, each a picture of its own.
        marks: whether each run's evaluation selected on held-out labels is marked.
        thresholds: whether GAF's tau is drawn, where distances are those that it is compared with.
        zero: whether the y axis begins at 0, and is the same for all panels.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    caption: str
    axes: tuple[Axis, ...] = (SAMPLES,)
    marks: bool = False
    thresholds: bool = False
    zero: bool = False

    def stem(self, axis: Axis) -> str:
        """The picture's file name without .png: the figure's, and against what where there are several."""
        return self.name if axis is self.axes[0] else f"{self.name}-{axis.name.split()[0]}"


CHARTS = (
    Chart(
        "accuracy",
        "Accuracy on the test set",
        (Panel("test_accuracy", "test accuracy (%)", 100.0, "%", 1),),
        "A circle marks the evaluation that each run's noisy held-out labels select.",
        axes=(SAMPLES, STEPS, TIME),
        marks=True,
    ),
    Chart(
        "distance",
        "Cosine distance between micro-gradients",
        (
            Panel(PAIR_DISTANCE, "mean distance of two micro-gradients", 1.0, "", 3),
            Panel("distance_mean", "mean distance to the running sum", 1.0, "", 3),
        ),
        "Mean over the steps between two evaluations; 0: same direction, 1: orthogonal. Distance of two micro-gradients: estimated from "
        "all that were compared, accepted or not, so that arms compare. Distance to the running sum: under averaging that is the sum of "
        "all earlier micro-gradients, under GAF of the accepted ones, so that the same micro-gradients have another distance in another "
        "arm; arms do not compare in it. Dashed: GAF's threshold τ, above which a micro-gradient is rejected.",
        thresholds=True,
    ),
    Chart(
        "memorisation",
        "Memorisation of wrong labels",
        (
            Panel("memorised", "memorised (%)", 100.0, "%", 1),
            Panel("corrected", "corrected (%)", 100.0, "%", 1),
        ),
        "Of the training samples with a flipped label: the share predicted as the wrong label (memorised) and as the true one (corrected).",
        zero=True,
    ),
)


OLDER = (
    "The records of {} are older and lack that estimate. Their curve shows B / (b + B) in its place, from the noise scale B over "
    "the last 100 steps, cut at 1."
)


def caption(chart: Chart, runs: Sequence[Run]) -> str:
    """The chart's, with what must be said of older records."""
    lines = [
        (run, line)
        for run in runs
        if any(panel.key == PAIR_DISTANCE for panel in chart.panels)
        for line in run.evals
    ]
    older = {id(run) for run, line in lines if PAIR_DISTANCE not in line}
    if not older:
        return chart.caption
    which = "these runs" if len(older) == len(runs) else f"{len(older)} of {len(runs)} runs"
    return f"{chart.caption} {OLDER.format(which)}"


@dataclass(frozen=True)
class Cell:
    """One pair of axes of a figure: a panel at a point of the grid.

    Attributes:
        where: the point in words; empty where there is one only.
        arms: those of the point, which go by their methods' names.
    """

    panel: Panel
    where: str
    arms: list[Arm]

    @property
    def title(self) -> str:
        return f"{self.panel.label}, {self.where}" if self.where else self.panel.label


def cells(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> list[Cell]:
    """The panels of a chart that some run has values for, at every point of the grid."""
    groups = group_by_point(group_by_arm(runs))
    places = [
        (where, [dataclasses.replace(arm, name=arm.method) for arm in group])
        for where, group in zip(point_names(groups), groups, strict=True)
    ]
    return [
        Cell(panel, where, group)
        for panel in chart.panels
        for where, group in places
        if any(values_along(run, panel.key, axis.key)[0].size for arm in group for run in arm.runs)
    ]


def charts_with_values(runs: list[Run]) -> list[Chart]:
    """The charts that these runs have something to show in."""
    return [chart for chart in CHARTS if cells(runs, chart)]


def names_in(found: Sequence[Cell]) -> list[str]:
    """The methods of some cells, each once."""
    return list(dict.fromkeys(arm.name for cell in found for arm in cell.arms))


def palette(names: Sequence[str]) -> dict[str, Shade]:
    """A colour for each arm, which is a function of its name alone, so that it is the same on every page."""
    return {name: shade(name) for name in names}


def shade(name: str) -> Shade:
    """A known arm's colour; a variant's, such as "GAF, tau 0.5", near that of its method; any other one by the name's checksum."""
    if name in KNOWN:
        return KNOWN[name]
    number = zlib.crc32(name.encode())
    tau = re.search(r"\btau (\d+(?:\.\d+)?)", name)
    place = (
        number % 1009 / 1009 if tau is None else 1 / (1 + math.exp((0.8 - float(tau[1])) / 0.12))
    )
    family = next((KNOWN[kind] for kind in kinds(name) if kind in KNOWN), None)
    hue = number // 1009 % 360 if family is None else hue_of(family) + SPREAD * (place - 0.5)
    return Shade(oklch(0.72 - 0.32 * place, 0.15, hue), oklch(0.88 - 0.3 * place, 0.13, hue))


def kinds(name: str) -> list[str]:
    """The methods that an arm may be a variant of, the nearest first."""
    words = name.split(", ")
    ours = ["GAF"] if name.lower().startswith("gaf") else []
    return [", ".join(words[:n]) for n in range(len(words) - 1, 0, -1)] + ours


def hue_of(shade: Shade) -> float:
    """In degrees, of OKLCH."""
    from matplotlib.colors import to_rgb

    linear = [
        ((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in to_rgb(shade.light)
    ]
    cones = [dot(row, linear) ** (1 / 3) for row in CONES]
    return math.degrees(math.atan2(dot(OPPONENTS[2], cones), dot(OPPONENTS[1], cones)))


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """A colour of OKLCH, in which equal steps look about equal (Ottosson 2020), cut off where a screen cannot show it."""
    import numpy as np
    from matplotlib.colors import to_hex

    turn = math.radians(hue)
    lab = np.array([lightness, chroma * math.cos(turn), chroma * math.sin(turn)])
    linear = np.linalg.solve(CONES, np.linalg.solve(OPPONENTS, lab) ** 3)
    srgb = np.where(
        linear > 0.0031308, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055, 12.92 * linear
    )
    red, green, blue = srgb.clip(0, 1).tolist()
    return str(to_hex((red, green, blue)))


def dot(row: Sequence[float], values: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(row, values, strict=True))


def thresholds(of: list[Arm]) -> dict[float, list[str]]:
    """tau of the arms under GAF's policy, and which arms; without those that accept everything (tau of 2)."""
    found: dict[float, list[str]] = {}
    for arm in of:
        tau = arm.config.get("tau")
        if is_gaf(arm) and tau is not None and tau < 2:
            found.setdefault(float(tau), []).append(arm.name)
    return found


def marked(run: Run, panel: Panel, axis: Axis) -> tuple[float, float] | None:
    """Where the held-out labels select, in the units of axis and panel."""
    line = selected_evaluation(run)
    if line is None or line.get(panel.key) is None or line.get(axis.key) is None:
        return None
    return line[axis.key] / axis.unit, line[panel.key] * panel.factor


def single(arm: Arm, of: list[Arm], mean: Curve | None) -> list[Run]:
    """The runs that are drawn one by one: all, or those of an arm without a mean where the arms are many."""
    return arm.runs if mean is None or len(of) <= CROWD else []


# --- PNG ---------------------------------------------------------------------------------------------------------


def write(runs: list[Run], out: Path, tell: Tell = silent) -> dict[str, Path]:
    """Writes the pictures of all charts (150 dpi) into the folder `out`; their paths by `Chart.stem`. tell: how far it is."""
    out.mkdir(parents=True, exist_ok=True)
    views = [(chart, axis) for chart in charts_with_values(runs) for axis in axes_of(runs, chart)]
    paths = {}
    for number, (chart, axis) in enumerate(views, 1):
        tell("drawing", number, len(views))
        paths[chart.stem(axis)] = path = out / f"{chart.stem(axis)}.png"
        static(runs, chart, axis).savefig(path, dpi=DPI)
    return paths


def axes_of(runs: list[Run], chart: Chart) -> list[Axis]:
    """The chart's axes that the runs have values along."""
    return [axis for axis in chart.axes if cells(runs, chart, axis)]


def canvas(width: float, height: float) -> "Figure":
    """An empty matplotlib figure of so many inches that no global state knows of, on a white ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def static(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> "Figure":
    """The chart's values against the axis, as a matplotlib figure; a panel is taller where many arms need room for their names."""
    found, axis = cells(runs, chart, axis), fitted(axis, runs)
    names = names_in(found)
    colours = palette(names)
    rows = [max(2.75, LINE * (len(cell.arms) + len(taus_of(chart, cell)) + 1)) for cell in found]
    figure, axes = column(8.0, rows, 0.68, margin(names))
    drawn = [
        fill(ax, cell.arms, cell.panel, chart, axis, colours)
        for ax, cell in zip(axes, found, strict=True)
    ]
    for ax, cell, ends in zip(axes, found, drawn, strict=True):
        dress(ax, cell.title, chart, cell.arms)
        if taus_of(chart, cell):
            ends += lines_of_tau(ax, cell.arms, colours)
    if chart.zero:
        level(axes)
    for ax, ends in zip(axes, drawn, strict=True):
        label_ends(ax, ends)
    for ax in axes[-1:]:
        ax.set_xlabel(axis.label, fontsize=10.5, color=SOFT, labelpad=6)
    return figure


def taus_of(chart: Chart, cell: Cell) -> list[float]:
    """The thresholds that are drawn, where the cell's distances are those that they are compared with."""
    if not chart.thresholds or cell.panel.key != "distance_mean":
        return []
    return list(thresholds(cell.arms))


def level(axes: "Sequence[Axes]") -> None:
    """The same range for all, so that heights compare."""
    ends = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def column(
    width: float, rows: Sequence[float], left: float, right: float
) -> tuple["Figure", list["Axes"]]:
    """A figure of `width` inches, and its axes, rows[i] inches high, one beneath the other, which run along the same values."""
    top, between, bottom = 0.5, 0.75, 0.65
    height = top + sum(rows) + between * (len(rows) - 1) + bottom
    figure = canvas(width, height)
    axes: list[Axes] = []
    for i, tall in enumerate(rows):
        y = height - top - sum(rows[: i + 1]) - between * i
        box = (left / width, y / height, 1 - (left + right) / width, tall / height)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
    return figure, axes


def margin(names: Sequence[str]) -> float:
    """Inches for the names at the lines' ends, and what leads to them."""
    return 0.2 + lead(len(names)) + 0.085 * max(8, *map(len, labels(names).values()))


def lead(names: int) -> float:
    """Inches between the axes and the names; more where many are moved far from their lines."""
    return 0.1 if names <= CROWD else 0.35


def fill(
    ax: "Axes", of: list[Arm], panel: Panel, chart: Chart, axis: Axis, colours: dict[str, Shade]
) -> list["Label"]:
    """Draws every arm. Returns the names for the lines' ends."""
    ends = {
        arm.name: end
        for arm in of
        if (end := draw(ax, arm, of, panel, chart, axis, colours[arm.name].light)) is not None
    }
    short = labels([*colours])
    return [Label(*end, short[name], colours[name].light) for name, end in ends.items()]


def draw(
    ax: "Axes", arm: Arm, of: list[Arm], panel: Panel, chart: Chart, axis: Axis, colour: str
) -> tuple[float, float] | None:
    """An arm's runs and their mean. Returns its last point, None without any."""
    z = 4.0 if is_gaf(arm) else 3.0
    end = None
    mean = curve(arm, panel.key, axis.key)
    for run in single(arm, of, mean):
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
        spot for run in single(arm, of, mean) if chart.marks and (spot := marked(run, panel, axis))
    ]
    if spots:
        across, up = zip(*spots, strict=True)
        ax.scatter(
            across, up, s=34, facecolors="white", edgecolors=colour, linewidths=1.6, zorder=6
        )
    return end


def track(run: Run, panel: Panel, axis: Axis) -> tuple[Values, Values]:
    """Where on the axis (p,), and the panel's values (p,)."""
    x, y = values_along(run, panel.key, axis.key)
    return x / axis.unit, y * panel.factor


def dress(ax: "Axes", title: str, chart: Chart, of: list[Arm]) -> None:
    """Axes with horizontal lines only, and the quantity named above them."""
    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    if chart.marks and len(of) <= CROWD:
        ax.set_title(
            "○ selected on noisy held-out labels", loc="right", fontsize=9, color=SOFT, pad=8
        )
    plain(ax)
    if chart.zero:
        ax.set_ylim(bottom=0)


def plain(ax: "Axes") -> None:
    """A line beneath, soft numbers, horizontal grid lines only."""
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


class Label(NamedTuple):
    """A name at a line's end (x, y), in data coordinates; x is None for a line that goes all the way."""

    x: float | None
    y: float
    text: str
    colour: str


LINE = 0.19  # inches between names


def lines_of_tau(ax: "Axes", of: list[Arm], colours: dict[str, Shade]) -> list[Label]:
    """Draws a dashed line at each threshold; returns their labels."""
    found = thresholds(of)
    shades = [colours[names[0]].light if len(found) > 1 else INK for names in found.values()]
    for tau, colour in zip(found, shades, strict=True):
        ax.axhline(tau, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    return [
        Label(None, tau, f"τ = {tau:g}", colour) for tau, colour in zip(found, shades, strict=True)
    ]


def label_ends(ax: "Axes", labels: list[Label]) -> None:
    """Names the lines at the right, moved apart where they would overlap, with a thin line where a name is not beside its end."""
    if not labels:
        return
    labels = sorted(labels, key=lambda label: label.y)
    low, high = ax.get_ylim()
    tall, gap = ax.bbox.height / ax.figure.dpi, lead(len(labels)) * ax.figure.dpi / ax.bbox.width
    ends = [(label.y - low) / (high - low) for label in labels]
    heights = apart(ends, gap=LINE / tall)
    for height, end, label in zip(heights, ends, labels, strict=True):
        x, _, text, colour = label
        across = (
            1.0
            if x is None
            else ax.transAxes.inverted().transform(ax.transData.transform((x, label.y)))[0]
        )
        if across < 0.95 or abs(height - end) > LINE / tall / 3:
            bend = ([across, 1.0, 1 + 0.8 * gap], [end, end, height])
            ax.plot(
                *bend,
                transform=ax.transAxes,
                color=colour,
                linewidth=0.6,
                alpha=0.6,
                clip_on=False,
                zorder=2,
            )
        ax.text(
            1 + gap,
            height,
            text,
            transform=ax.transAxes,
            va="center",
            fontsize=10.5,
            color=darker(colour),
            parse_math=False,
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights in [0, 1], moved to be at least `gap` from each other, by the least squares, and below 1.

    Those that would overlap form groups, which keep their mean.
    """
    groups: list[tuple[float, int]] = []  # mean of height - place * gap, and how many
    for place, height in enumerate(heights):
        mean, size = height - place * gap, 1
        while groups and groups[-1][0] >= mean:
            other, others = groups.pop()
            mean, size = (mean * size + other * others) / (size + others), size + others
        groups.append((mean, size))
    levels = [mean for mean, size in groups for _ in range(size)]
    return [
        min(level + place * gap, 1 - (len(levels) - 1 - place) * gap)
        for place, level in enumerate(levels)
    ]


def darker(colour: str) -> str:
    """A colour as text: dark enough to be read on white."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.8):02x}" for i in (1, 3, 5))


def shorten(name: str, length: int = 26) -> str:
    """On one line, at most `length` characters: cut in the middle, for it is the end that tells names apart."""
    line = " ".join(name.split())
    if len(line) <= length:
        return line
    tail = length // 2
    return line[: length - tail - 1].rstrip() + "…" + line[-tail:].lstrip()


def labels(names: Sequence[str], length: int = 26) -> dict[str, str]:
    """The names shortened, but no two to the same: each as long as that takes."""
    found = {name: shorten(name, length) for name in names}
    alike = [name for name in names if list(found.values()).count(found[name]) > 1]
    longest = max(map(len, names), default=0)
    return found | labels(alike, length + 8) if alike and length < longest else found


# --- interactive -------------------------------------------------------------------------------------------------


def interactive(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> Any:
    """The same as a `plotly.graph_objects.Figure`, without a ground of its own.

    Each trace carries as `meta` its arm's two colours, "light", in which it is drawn, and "dark", and whether it is "single":
    of one run, and so to be hidden where more than CROWD arms are shown.
    """
    found, axis = cells(runs, chart, axis), fitted(axis, runs)
    names = names_in(found)
    colours = palette(names)
    titles = [html.escape(cell.title, quote=False) for cell in found]
    figure = stacked(titles, axis.label, [chart.zero] * len(found))
    for row, cell in enumerate(found, 1):
        for arm in sorted(cell.arms, key=is_gaf):  # GAF on top
            for trace in traces(arm, cell.panel, chart, axis, colours[arm.name], first=row == 1):
                ranked = trace | {"legendrank": names.index(arm.name)}
                figure.add_trace(ranked, row=row, col=1)
        for tau in taus_of(chart, cell):
            draw_tau(figure, tau, row)
    if chart.zero:
        figure.update_yaxes(matches="y")
    figure.update_xaxes(unifiedhovertitle_text=axis.hover)
    return figure


def draw_tau(figure: Any, tau: float, row: int) -> None:
    note = {"annotation_text": f"τ = {tau:g}", "annotation_position": "top right"}
    dash = {"dash": "dash", "width": 1.2, "color": SOFT}
    figure.add_hline(y=tau, line=dash, row=row, col=1, **note)


def stacked(titles: Sequence[str], across: str, zeros: Sequence[bool]) -> Any:
    """Axes one above the other, each with its title at the left and numbers along both sides."""
    from plotly.subplots import make_subplots

    rows = len(titles)
    gap = 0.3 / rows if rows > 1 else 0
    figure = make_subplots(rows=rows, shared_xaxes=True, vertical_spacing=gap)
    layout(figure)
    figure.update_layout(height=110 + 270 * rows)
    corner = {"xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom"}
    for row, (title, zero) in enumerate(zip(titles, zeros, strict=True), 1):
        domain = figure.layout[f"yaxis{row if row > 1 else ''}"].domain or (0, 1)
        figure.add_annotation(
            text=title, y=domain[1], showarrow=False, align="left", xshift=-40, yshift=6, **corner
        )
        figure.update_yaxes(rangemode="tozero" if zero else "normal", row=row, col=1)
    figure.update_xaxes(showticklabels=True)
    figure.update_xaxes(title_text=across, row=rows, col=1)
    return figure


def layout(figure: Any) -> None:
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 12, "t": 52, "b": 48},
        hovermode="x unified",
        showlegend=False,  # the page has one for all its figures
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(showgrid=False, zeroline=False, hoverformat=",.1f", fixedrange=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)


def traces(
    arm: Arm, panel: Panel, chart: Chart, axis: Axis, shade: Shade, first: bool
) -> list[dict[str, Any]]:
    """The arm's runs, their mean, and the selected evaluations. first: whether the arm is named in the legend here."""
    common = named(arm.name, shade)
    mean = curve(arm, panel.key, axis.key)
    made = [thin(run, panel, axis, shade) for run in arm.runs if len(arm.runs) > 1 or mean is None]
    made = [
        common | {"meta": common["meta"] | {"single": mean is not None}} | line
        for line in made
        if line["x"]
    ]
    if mean is not None:
        made.append(common | bold(mean, panel, axis, shade))
    if made:
        made[-1]["showlegend"] = first
    spots = (
        [spot for spot in (marked(run, panel, axis) for run in arm.runs) if spot]
        if chart.marks
        else []
    )
    if spots:
        circle = {"symbol": "circle-open", "size": 9, "color": shade.light, "line": {"width": 2}}
        x, y = (list(values) for values in zip(*spots, strict=True))
        single = {"meta": common["meta"] | {"single": True}}
        made.append(
            common
            | single
            | {"mode": "markers", "x": x, "y": y, "marker": circle, "hoverinfo": "skip"}
        )
    return made


def named(arm: str, shade: Shade) -> dict[str, Any]:
    """What every trace of an arm has."""
    meta = shade._asdict() | {"single": False}
    return {
        "type": "scatter",
        "name": literal(arm),
        "legendgroup": arm,
        "meta": meta,
        "showlegend": False,
    }


def some(values: Values) -> Values:
    """At most MOST of the values, evenly drawn, the last among them: as many as a screen can show."""
    import numpy as np

    return (
        values
        if len(values) <= MOST
        else values[np.linspace(0, len(values) - 1, MOST).round().astype(int)]
    )


def literal(name: str) -> str:
    """A name that plotly shows as it is: it would read tags, and %{...} as a template."""
    return html.escape(shorten(name, 60), quote=False).replace("%{", "%\N{ZERO WIDTH SPACE}{")


def thin(run: Run, panel: Panel, axis: Axis, shade: Shade) -> dict[str, Any]:
    x, y = (some(values) for values in track(run, panel, axis))
    line = {
        "color": shade.light,
        "width": 1,
        "dash": "solid" if status(run) == "finished" else "dash",
    }
    return {
        "mode": "lines",
        "x": x.tolist(),
        "y": y.round(5).tolist(),
        "line": line,
        "opacity": 0.45,
        "hoverinfo": "skip",
    }


def bold(mean: Curve, panel: Panel, axis: Axis, shade: Shade) -> dict[str, Any]:
    number = f":.{panel.digits}f"
    spread = f" ({{low{number}}} to {{high{number}}})" if mean.n > 1 else ""
    scaled = [(some(values) * panel.factor).tolist() for values in (mean.mean, mean.low, mean.high)]
    text = [
        f"{m:.{panel.digits}f}{panel.unit}" + spread.format(low=low, high=high)
        for m, low, high in zip(*scaled, strict=True)
    ]
    line = {"color": shade.light, "width": 3}
    y = [round(value, 5) for value in scaled[0]]
    x = (some(mean.x) / axis.unit).tolist()
    mode = "lines" if len(x) > 1 else "markers"  # a line of one point is nothing to see
    return {
        "mode": mode,
        "x": x,
        "y": y,
        "text": text,
        "line": line,
        "hovertemplate": "%{fullData.name}: %{text}<extra></extra>",
    }
