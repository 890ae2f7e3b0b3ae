"""The figures of a report, as PNG (matplotlib) and interactive (plotly), both drawn from the same description of the runs.

Thin lines are single runs, bold ones the mean over an arm's seeds; runs that are not finished are dashed. Where there are
more than CROWD arms, single runs are left out. Colours belong to arms: averaging grey, GAF and its variants blue, controls
warm, other methods green and violet.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaf_lab.records import Run
from gaf_lab.statistics import Arm, Curve, Values, arms, curve, last, points, selected, status

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
# further arms under GAF's policy
BLUES = (Shade("#12a08a", "#4fd6c0"), Shade("#3c4a63", "#8b9ab8"))
OTHERS = (
    Shade("#5a3a22", "#a0714f"),
    Shade("#e58fb0", "#ffb3cd"),
    Shade("#b33a3a", "#ff8a80"),
    Shade("#5d6b73", "#c3ced6"),
)


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
    unit, second = clock(max((last(run, axis.key) or 0.0 for run in runs), default=0.0))
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
        thresholds: whether GAF's tau is drawn.
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
        (Panel("distance_mean", "mean cosine distance", 1.0, "", 3),),
        "Mean over the steps between two evaluations. 0: same direction, 1: orthogonal; dashed: GAF's threshold τ, above which "
        "a micro-gradient is rejected.",
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


def palette(names: Sequence[str]) -> dict[str, Shade]:
    """A colour for each arm: the known arms always the same, other GAF arms in blues, the rest in order, repeating when spent."""
    blues, others = 0, 0
    colours = {}
    for name in names:
        if name in KNOWN:
            colours[name] = KNOWN[name]
        elif name.lower().startswith("gaf"):
            colours[name] = BLUES[blues % len(BLUES)]
            blues += 1
        else:
            colours[name] = OTHERS[others % len(OTHERS)]
            others += 1
    return colours


def thresholds(of: list[Arm]) -> dict[float, list[str]]:
    """tau of the arms under GAF's policy, and which arms; without those that accept everything (tau of 2)."""
    found: dict[float, list[str]] = {}
    for arm in of:
        tau = arm.config.get("tau")
        if arm.config.get("policy") == "gaf" and tau is not None and tau < 2:
            found.setdefault(float(tau), []).append(arm.name)
    return found


def marked(run: Run, panel: Panel, axis: Axis) -> tuple[float, float] | None:
    """Where the held-out labels select, in the units of axis and panel."""
    line = selected(run)
    if line is None or line.get(panel.key) is None or line.get(axis.key) is None:
        return None
    return line[axis.key] / axis.unit, line[panel.key] * panel.factor


def single(arm: Arm, of: list[Arm], mean: Curve | None) -> list[Run]:
    """The runs that are drawn one by one: all, or those of an arm without a mean where the arms are many."""
    return arm.runs if mean is None or len(of) <= CROWD else []


# --- PNG ---------------------------------------------------------------------------------------------------------


def write(runs: list[Run], out: Path) -> dict[str, Path]:
    """Writes the pictures of all charts (150 dpi) into the folder `out`; their paths by `Chart.stem`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for chart in CHARTS:
        for axis in chart.axes:
            paths[chart.stem(axis)] = path = out / f"{chart.stem(axis)}.png"
            static(runs, chart, axis).savefig(path, dpi=DPI)
    return paths


def canvas(width: float, height: float) -> "Figure":
    """An empty matplotlib figure of so many inches that no global state knows of, on a white ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def static(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> "Figure":
    """The chart's values against the axis, as a matplotlib figure; it is taller where many arms need room for their names."""
    of = arms(runs)
    axis = fitted(axis, runs)
    colours = palette([arm.name for arm in of])
    right = margin([arm.name for arm in of])
    tall = max(2.75, LINE * (len(of) + 1))
    width, height = 8.0, 1.15 + tall * len(chart.panels)
    figure = canvas(width, height)
    axes = figure.subplots(len(chart.panels), sharex=True, sharey=chart.zero, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=0.68 / width,
        right=1 - right / width,
        top=1 - 0.5 / height,
        bottom=0.6 / height,
        hspace=0.24,
    )
    drawn = [
        fill(ax, of, panel, chart, axis, colours)
        for ax, panel in zip(axes, chart.panels, strict=True)
    ]
    for ax, panel, ends in zip(axes, chart.panels, drawn, strict=True):
        dress(ax, panel, chart, of if ends else [])
        label_ends(ax, ends + (lines_of_tau(ax, of, colours) if chart.thresholds and ends else []))
    axes[-1].set_xlabel(axis.label, fontsize=10.5, color=SOFT, labelpad=6)
    return figure


def margin(names: Sequence[str]) -> float:
    """Inches for the names at the lines' ends, and what leads to them."""
    return 0.2 + lead(len(names)) + 0.085 * max(8, *(len(shorten(name)) for name in names))


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
    return [Label(*end, shorten(name), colours[name].light) for name, end in ends.items()]


def draw(
    ax: "Axes", arm: Arm, of: list[Arm], panel: Panel, chart: Chart, axis: Axis, colour: str
) -> tuple[float, float] | None:
    """An arm's runs and their mean. Returns its last point, None without any."""
    z = 4.0 if arm.config.get("policy") == "gaf" else 3.0
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
    x, y = points(run, panel.key, axis.key)
    return x / axis.unit, y * panel.factor


def dress(ax: "Axes", panel: Panel, chart: Chart, of: list[Arm]) -> None:
    """Axes with horizontal lines only, and the quantity named above them; a word where nothing was recorded."""
    ax.set_title(panel.label, loc="left", fontsize=11, color=INK, pad=8)
    if chart.marks and 0 < len(of) <= CROWD:
        ax.set_title(
            "○ selected on noisy held-out labels", loc="right", fontsize=9, color=SOFT, pad=8
        )
    plain(ax)
    if chart.zero:
        ax.set_ylim(bottom=0)
    if not of:
        blank(ax)


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


def blank(ax: "Axes") -> None:
    ax.text(
        0.5,
        0.5,
        "not recorded in these runs",
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=SOFT,
        fontsize=11,
    )
    ax.set(xticks=[], yticks=[])


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
    """On one line, cut at `length` characters."""
    line = " ".join(name.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


# --- interactive -------------------------------------------------------------------------------------------------


def interactive(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> Any:
    """The same as a `plotly.graph_objects.Figure`, without a ground of its own.

    Each trace carries as `meta` its arm's two colours, "light", in which it is drawn, and "dark", and whether it is "single":
    of one run, and so to be hidden where more than CROWD arms are shown.
    """
    from plotly.subplots import make_subplots

    of = arms(runs)
    axis = fitted(axis, runs)
    colours = palette([arm.name for arm in of])
    rows = len(chart.panels)
    figure = make_subplots(
        rows=rows,
        shared_xaxes=True,
        shared_yaxes="all" if chart.zero else False,
        vertical_spacing=0.08,
    )
    for row, panel in enumerate(chart.panels, 1):
        for arm in sorted(of, key=lambda arm: arm.config.get("policy") == "gaf"):  # GAF on top
            for trace in traces(arm, panel, chart, axis, colours[arm.name], first=row == 1):
                figure.add_trace(trace | {"legendrank": of.index(arm)}, row=row, col=1)
        figure.update_yaxes(
            title_text=panel.label, rangemode="tozero" if chart.zero else "normal", row=row, col=1
        )
    if chart.thresholds:
        for tau in thresholds(of):
            note = {"annotation_text": f"τ = {tau:g}", "annotation_position": "top left"}
            figure.add_hline(y=tau, line={"dash": "dash", "width": 1.2, "color": SOFT}, **note)
    figure.update_xaxes(title_text=axis.label, row=rows, col=1)
    layout(figure, rows)
    figure.update_xaxes(unifiedhovertitle_text=axis.hover)
    return figure


def layout(figure: Any, rows: int) -> None:
    figure.update_layout(
        template="none",
        height=110 + 250 * rows,
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
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
