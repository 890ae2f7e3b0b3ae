"""The figures of a report, as PNG (matplotlib) and interactive (plotly), both drawn from the same description of the runs.

Thin lines are single runs, bold ones the mean over an arm's seeds; runs that are not finished are dashed. Colours
belong to arms and stay apart for colour-blind readers: averaging grey, GAF blue, controls warm.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaf_lab.records import Run
from gaf_lab.statistics import Arm, Curve, Values, arms, curve, points, selected, status

if TYPE_CHECKING:  # importing them takes a second, and a terminal table needs neither
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MOST = 400  # points of a line in the page
THOUSAND = 1000.0
SAMPLES = "samples seen (thousands)"
INK, SOFT, GRID = "#1b1d21", "#5c6370", "#e6e7ea"


class Shade(NamedTuple):
    """A colour on a light and on a dark ground."""

    light: str
    dark: str


KNOWN = {
    "averaging": Shade("#808080", "#9a9a9a"),
    "GAF": Shade("#1559c9", "#4f93ff"),
    "random subset": Shade("#e0561b", "#f2672a"),
    "replay skip": Shade("#e2a800", "#ffd166"),
    "random skip": Shade("#8c1d4f", "#b8336f"),
}
BLUES = (Shade("#2aa7c4", "#5fd0e8"), Shade("#0b2a6b", "#2f55c4"))  # further arms under GAF's policy
OTHERS = (Shade("#5a3a22", "#a0714f"), Shade("#e58fb0", "#ffb3cd"), Shade("#6b7a1e", "#b5c95a"), Shade("#4a4a4a", "#d0d0d0"))


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
    """A figure; its PNG is `<name>.png`.

    Attributes:
        marks: whether each run's evaluation selected on held-out labels is marked.
        thresholds: whether GAF's tau is drawn.
        zero: whether the y axis begins at 0, and is the same for all panels.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    caption: str
    marks: bool = False
    thresholds: bool = False
    zero: bool = False


CHARTS = (
    Chart(
        "accuracy",
        "Accuracy on the test set",
        (Panel("test_accuracy", "test accuracy (%)", 100.0, "%", 1),),
        "A circle marks the evaluation that each run's noisy held-out labels select.",
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
        (Panel("memorised", "memorised (%)", 100.0, "%", 1), Panel("corrected", "corrected (%)", 100.0, "%", 1)),
        "Of the training samples with a flipped label: the share predicted as the wrong label (memorised) and as the true one (corrected).",
        zero=True,
    ),
)


def palette(names: Sequence[str]) -> dict[str, Shade]:
    """A colour for each arm: the known arms always the same, other GAF arms blue, the rest in order, repeating when spent."""
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


def marked(run: Run, panel: Panel) -> tuple[float, float] | None:
    """Where the held-out labels select, in the panel's units."""
    line = selected(run)
    if line is None or line.get(panel.key) is None:
        return None
    return line["samples"] / THOUSAND, line[panel.key] * panel.factor


# --- PNG ---------------------------------------------------------------------------------------------------------


def write(runs: list[Run], out: Path) -> dict[str, Path]:
    """Writes `accuracy.png`, `distance.png` and `memorisation.png` (150 dpi) into the folder `out`; their paths by name."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {chart.name: out / f"{chart.name}.png" for chart in CHARTS}
    for chart in CHARTS:
        static(runs, chart).savefig(paths[chart.name], dpi=DPI)
    return paths


def static(runs: list[Run], chart: Chart) -> "Figure":
    """A matplotlib figure that no global state knows of, on a white ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of = arms(runs)
    colours = palette([arm.name for arm in of])
    right = 0.3 + 0.085 * max(8, *(len(shorten(arm.name)) for arm in of))  # inches for the labels at the lines' ends
    width, height = 8.0, 1.15 + 2.75 * len(chart.panels)
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chart.panels), sharex=True, sharey=chart.zero, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.55 / width, right=1 - right / width, top=1 - 0.5 / height, bottom=0.6 / height, hspace=0.24)
    drawn = [[draw(ax, arm, panel, chart, colours[arm.name].light) for arm in of] for ax, panel in zip(axes, chart.panels, strict=True)]
    for ax, panel, ends in zip(axes, chart.panels, drawn, strict=True):
        dress(ax, panel, chart, of if any(end is not None for end in ends) else [])
        labels = [(end, shorten(arm.name), colours[arm.name].light) for arm, end in zip(of, ends, strict=True) if end is not None]
        label_ends(ax, labels + (lines_of_tau(ax, of, colours) if chart.thresholds and labels else []))
    axes[-1].set_xlabel(SAMPLES, fontsize=10.5, color=SOFT, labelpad=6)
    return figure


def draw(ax: "Axes", arm: Arm, panel: Panel, chart: Chart, colour: str) -> float | None:
    """An arm's runs and their mean. Returns the height of its last point, None without any."""
    z = 4.0 if arm.config.get("policy") == "gaf" else 3.0
    end = None
    for run in arm.runs:
        x, y = track(run, panel)
        if not x.size:
            continue
        dashed = status(run) != "finished"
        ax.plot(x, y, color=colour, linewidth=0.9, alpha=0.5, linestyle=(0, (4, 2)) if dashed else "-", zorder=z - 1)
        end = float(y[-1])
    mean = curve(arm, panel.key)
    if mean is not None:
        ax.plot(mean.samples / THOUSAND, mean.mean * panel.factor, color=colour, linewidth=2.4, solid_capstyle="round", zorder=z)
        end = float(mean.mean[-1] * panel.factor)
    if chart.marks:
        spots = [spot for spot in (marked(run, panel) for run in arm.runs) if spot]
        if spots:
            across, up = zip(*spots, strict=True)
            ax.scatter(across, up, s=34, facecolors="white", edgecolors=colour, linewidths=1.6, zorder=6)
    return end


def track(run: Run, panel: Panel) -> tuple[Values, Values]:
    """Thousands of samples seen (p,), and the panel's values (p,)."""
    x, y = points(run, panel.key)
    return x / THOUSAND, y * panel.factor


def dress(ax: "Axes", panel: Panel, chart: Chart, of: list[Arm]) -> None:
    """Axes with horizontal lines only, and the quantity named above them; a word where nothing was recorded."""
    ax.set_title(panel.label, loc="left", fontsize=11, color=INK, pad=8)
    if chart.marks and of:
        ax.set_title("○ selected on noisy held-out labels", loc="right", fontsize=9, color=SOFT, pad=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(SOFT)
    ax.tick_params(colors=SOFT, labelsize=10, length=0, pad=6)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.015)
    if chart.zero:
        ax.set_ylim(bottom=0)
    if not of:
        ax.text(0.5, 0.5, "not recorded in these runs", transform=ax.transAxes, ha="center", va="center", color=SOFT, fontsize=11)
        ax.set(xticks=[], yticks=[])


def lines_of_tau(ax: "Axes", of: list[Arm], colours: dict[str, Shade]) -> list[tuple[float, str, str]]:
    """Draws a dashed line at each threshold; returns their labels."""
    found = thresholds(of)
    shades = [colours[names[0]].light if len(found) > 1 else INK for names in found.values()]
    for tau, colour in zip(found, shades, strict=True):
        ax.axhline(tau, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    return [(tau, f"τ = {tau:g}", colour) for tau, colour in zip(found, shades, strict=True)]


def label_ends(ax: "Axes", labels: list[tuple[float, str, str]]) -> None:
    """Names the lines at their right ends, moved apart where they would overlap."""
    if not labels:
        return
    labels = sorted(labels)
    low, high = ax.get_ylim()
    heights = apart([(y - low) / (high - low) for y, _, _ in labels], gap=0.068)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        ax.text(1.015, height, text, transform=ax.transAxes, va="center", fontsize=10.5, color=darker(colour), parse_math=False)


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
    return [min(level + place * gap, 1 - (len(levels) - 1 - place) * gap) for place, level in enumerate(levels)]


def darker(colour: str) -> str:
    """A colour as text: dark enough to be read on white."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.8):02x}" for i in (1, 3, 5))


def shorten(name: str, length: int = 26) -> str:
    """On one line, cut at `length` characters."""
    line = " ".join(name.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


# --- interactive -------------------------------------------------------------------------------------------------


def interactive(runs: list[Run], chart: Chart) -> Any:
    """The same as a `plotly.graph_objects.Figure`, without a ground of its own.

    Each trace carries its arm's two colours as `meta`, {"light", "dark"}; it is drawn in the first.
    """
    from plotly.subplots import make_subplots

    of = arms(runs)
    colours = palette([arm.name for arm in of])
    rows = len(chart.panels)
    figure = make_subplots(rows=rows, shared_xaxes=True, shared_yaxes="all" if chart.zero else False, vertical_spacing=0.08)
    for row, panel in enumerate(chart.panels, 1):
        for arm in sorted(of, key=lambda arm: arm.config.get("policy") == "gaf"):  # GAF on top
            for trace in traces(arm, panel, chart, colours[arm.name], first=row == 1):
                figure.add_trace(trace | {"legendrank": of.index(arm)}, row=row, col=1)
        figure.update_yaxes(title_text=panel.label, rangemode="tozero" if chart.zero else "normal", row=row, col=1)
    if chart.thresholds:
        for tau in thresholds(of):
            note = {"annotation_text": f"τ = {tau:g}", "annotation_position": "top left"}
            figure.add_hline(y=tau, line={"dash": "dash", "width": 1.2, "color": SOFT}, **note)
    figure.update_xaxes(title_text=SAMPLES, row=rows, col=1)
    layout(figure, rows)
    return figure


def layout(figure: Any, rows: int) -> None:
    figure.update_layout(
        template="none",
        height=150 + 250 * rows,
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        hovermode="x unified",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(showgrid=False, zeroline=False, hoverformat=",.1f", fixedrange=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)


def traces(arm: Arm, panel: Panel, chart: Chart, shade: Shade, first: bool) -> list[dict[str, Any]]:
    """The arm's runs, their mean, and the selected evaluations. first: whether the arm is named in the legend here."""
    common = {"type": "scatter", "name": literal(arm.name), "legendgroup": arm.name, "meta": shade._asdict(), "showlegend": False}
    mean = curve(arm, panel.key)
    made = [thin(run, panel, shade) for run in arm.runs if len(arm.runs) > 1 or mean is None]
    made = [common | line for line in made if line["x"]]
    if mean is not None:
        made.append(common | bold(mean, panel, shade))
    if made:
        made[-1]["showlegend"] = first
    spots = [spot for spot in (marked(run, panel) for run in arm.runs) if spot] if chart.marks else []
    if spots:
        circle = {"symbol": "circle-open", "size": 9, "color": shade.light, "line": {"width": 2}}
        x, y = (list(values) for values in zip(*spots, strict=True))
        made.append(common | {"mode": "markers", "x": x, "y": y, "marker": circle, "hoverinfo": "skip"})
    return made


def some(values: Values) -> Values:
    """At most MOST of the values, evenly drawn, the last among them: as many as a screen can show."""
    import numpy as np

    return values if len(values) <= MOST else values[np.linspace(0, len(values) - 1, MOST).round().astype(int)]


def literal(name: str) -> str:
    """A name that plotly shows as it is: it would read tags, and %{...} as a template."""
    return html.escape(shorten(name, 60), quote=False).replace("%{", "%\N{ZERO WIDTH SPACE}{")


def thin(run: Run, panel: Panel, shade: Shade) -> dict[str, Any]:
    x, y = (some(values) for values in track(run, panel))
    line = {"color": shade.light, "width": 1, "dash": "solid" if status(run) == "finished" else "dash"}
    return {"mode": "lines", "x": x.tolist(), "y": y.round(5).tolist(), "line": line, "opacity": 0.45, "hoverinfo": "skip"}


def bold(mean: Curve, panel: Panel, shade: Shade) -> dict[str, Any]:
    number = f":.{panel.digits}f"
    spread = f" ({{low{number}}} to {{high{number}}})" if mean.n > 1 else ""
    scaled = [(some(values) * panel.factor).tolist() for values in (mean.mean, mean.low, mean.high)]
    text = [f"{m:.{panel.digits}f}{panel.unit}" + spread.format(low=low, high=high) for m, low, high in zip(*scaled, strict=True)]
    line = {"color": shade.light, "width": 3}
    y = [round(value, 5) for value in scaled[0]]
    x = (some(mean.samples) / THOUSAND).tolist()
    return {"mode": "lines", "x": x, "y": y, "text": text, "line": line, "hovertemplate": "%{fullData.name}: %{text}<extra></extra>"}
