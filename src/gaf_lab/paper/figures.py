"""The paper's figures, drawn from runs: over training, against a field of the config, as a table, and the idea in the plane.

Everything is drawn twice from one description, as PNG (matplotlib) and for the page (plotly). Of each arm: the mean over
seeds as a line, single seeds as faint dots, and what the paper prints as a hollow diamond of the arm's colour.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaf_lab.paper.items import HUMAN_COLUMN, Item
from gaf_lab.paper.sheet import head_height, heading, sheet, write_head
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import BASELINE, Arm, gaf_of, group_by_arm, is_gaf
from gaf_lab.report.cells import thresholds
from gaf_lab.report.charts import CHARTS, SAMPLES, STEPS, TIME, Axis, Chart, Panel, fit_axis
from gaf_lab.report.figures import DPI, canvas, draw_arms, level, plain_axes, title_axes
from gaf_lab.report.interactive import add_tau_line, arm_traces, stack_panels, trace_base
from gaf_lab.report.labels import Label, draw_taus, label_ends, margin, short_names, shorten
from gaf_lab.report.measures import Measure
from gaf_lab.report.palette import CROWD, INK, SOFT, Shade, palette
from gaf_lab.report.statistics import Difference
from gaf_lab.report.text import MINUS, NONE, signed, spread_as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# where a run stands: a value of the item's x, HUMAN_COLUMN, or network and data of a panel
Place = float | str

PANELS = {panel.key: panel for chart in CHARTS for panel in chart.panels}
PANELS["clean_accuracy"] = Panel(
    "clean_accuracy", "accuracy on correctly labelled training samples (%)", 100.0, "%", 1
)
DISTANCES = (
    Measure(
        "distance",
        "cosine distance, mean over the run",
        "distance",
        partial(measures.mean_over_run, key="distance_mean"),
    ),
    Measure(
        "lowest",
        "cosine distance, lowest evaluation",
        "distance",
        partial(measures.lowest_value, key="distance_mean"),
    ),
    Measure(
        "distance_last",
        "cosine distance, last",
        "distance",
        partial(measures.last_value, key="distance_mean"),
    ),
)
CLEAN = Measure(
    "clean_accuracy",
    "accuracy on correctly labelled training samples",
    "share",
    partial(measures.last_value, key="clean_accuracy"),
)
PANEL_MEASURES = {
    "test_accuracy": (measures.LAST, measures.SELECTED),
    "distance_mean": DISTANCES,
    "memorised": (measures.MEMORISED,),
    "corrected": (measures.CORRECTED,),
    "clean_accuracy": (CLEAN,),
}
ACROSS = {
    "noise_rate": "training labels flipped (%)",
    "tau": "τ, the largest cosine distance that is accepted",
    "b": "micro-batch size b",
}
NAMES = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar100n": "CIFAR-100N-Fine", "cifar100n-coarse": "CIFAR-100N-Coarse",
    "mnist5k": "MNIST-5k", "fashion-mnist": "Fashion-MNIST", "noise": "white noise", "imagenet": "ImageNet", "digits": "digits",
    "resnet18": "ResNet18", "resnet34": "ResNet34", "preact-resnet34": "PreAct ResNet34", "vit-l16": "ViT-L/16", "vit-tiny": "a small ViT",
    "mlp": "MLP", "convnet": "a small convolutional network",
}  # fmt: skip
MEANT = ("Mean ± standard deviation over seeds; beneath a difference, its 95% interval.",)
NOTHING = "No run of this figure was finished."
KEY = "◇ paper   ● mean over seeds   · one seed"


# --- runs at their places ----------------------------------------------------------------------------------------


def place(item: Item, run: Run) -> Place:
    """Where on the item's axis a run stands; over training, in which panel."""
    config = run.header["config"]
    if item.x is None:
        return f"{NAMES.get(config['model'], config['model'])} on {NAMES.get(config['dataset'], config['dataset'])}"
    if item.x == "noise_rate" and config["dataset"] == "cifar100n":
        return HUMAN_COLUMN
    return 0.0 if item.x == "noise_rate" and config["noise"] == "none" else float(config[item.x])


def ordered(places: Sequence[Place]) -> list[Place]:
    """Numbers, rising, then words as they come; each once."""
    once = dict.fromkeys(places)
    return [
        *sorted(x for x in once if not isinstance(x, str)),
        *(x for x in once if isinstance(x, str)),
    ]


def grouped(item: Item, runs: list[Run]) -> dict[Place, list[Arm]]:
    """The arms at each place, in order."""
    at = [(place(item, run), run) for run in runs]
    return {
        x: group_by_arm(run for other, run in at if other == x) for x in ordered([x for x, _ in at])
    }


def comparable(item: Item, groups: dict[Place, list[Arm]], x: Place) -> list[Arm]:
    """The arms at a place, and those of other places that serve at all."""
    return groups[x] + [
        arm
        for other, arms in groups.items()
        if other != x
        for arm in arms
        if serves_everywhere(item, arm)
    ]


def serves_everywhere(item: Item, arm: Arm) -> bool:
    """Whether the item's x says nothing to the arm: averaging has no tau."""
    return item.x == "tau" and arm.config["policy"] == "mean"


def names_of(item: Item, runs: list[Run]) -> list[str]:
    """The arms, those of the runs first."""
    names = {
        id(run): arm.name
        for arms in grouped(item, runs).values()
        for arm in arms
        for run in arm.runs
    }
    return list(
        dict.fromkeys([*(names[id(run)] for run in runs), *(item.paper if runs == [] else {})])
    )


def printed(item: Item, arm: str, x: Place, key: str) -> float | None:
    """What the paper prints; over training, under the key of the evaluations."""
    row = item.paper.get(arm, {})
    return row.get(key) if item.x is None else row.get(x) if key == item.keys[0] else None


def pairs(of: list[Arm]) -> list[tuple[Arm, Arm]]:
    """GAF with each arm under another policy, averaging first, and each of its variants with GAF."""
    gaf = gaf_of(of)
    if gaf is None:
        return []
    others = sorted((arm for arm in of if not is_gaf(arm)), key=lambda arm: arm.name != BASELINE)
    return [(gaf, arm) for arm in others] + [
        (arm, gaf) for arm in of if is_gaf(arm) and arm is not gaf
    ]


def differences(item: Item, runs: list[Run], measure: Measure) -> list[tuple[Place, Difference]]:
    """The paired differences at every place."""
    groups = grouped(item, runs)
    return [
        (x, gap)
        for x in groups
        for one, other in pairs(comparable(item, groups, x))
        if (
            any(arm in groups[x] for arm in (one, other))
            and (gap := st.paired_difference(one, other, measure))
        )
    ]


def spoken(item: Item, x: Place) -> str:
    """A place as a reader would say it."""
    if isinstance(x, str):
        return x
    return {"noise_rate": f"{100 * x:g}%", "tau": f"τ = {x:g}", "b": f"b = {x:g}"}[item.x or ""]


# --- figures -----------------------------------------------------------------------------------------------------


def axes_of(item: Item) -> tuple[Axis, ...]:
    """What accuracy over training is drawn against: samples, steps taken, time. All else has one axis."""
    return (
        (SAMPLES, STEPS, TIME)
        if item.kind == "curves" and "test_accuracy" in item.keys
        else (SAMPLES,)
    )


def chart_of(item: Item) -> Chart:
    return Chart(
        item.id, item.title, tuple(PANELS[key] for key in item.keys), "", axes=axes_of(item)
    )


def fitting(chart: Chart, panel: Panel) -> Chart:
    """The chart with the marks that belong to this panel: circles for accuracy, thresholds for distances."""
    shares = panel.key in ("memorised", "corrected", "clean_accuracy")
    return dataclasses.replace(
        chart,
        marks=panel.key == "test_accuracy",
        thresholds=panel.key == "distance_mean",
        zero=shares,
    )


def draw(item: Item, runs: list[Run], out: Path, notes: Sequence[str] = ()) -> Path:
    """Writes `fig1.png` (150 dpi) into the folder `out`, and where accuracy runs over training `fig1-steps.png` and `fig1-time.png`.

    The notes are sentences that are printed beneath the title: scale, data, seeds. Returns the path of the first.
    """
    out.mkdir(parents=True, exist_ok=True)
    chart = chart_of(item)
    for axis in chart.axes:
        static(item, runs, notes, axis).savefig(out / f"{chart.stem(axis)}.png", dpi=DPI)
    return out / f"{item.id}.png"


def picture(item: Item, runs: list[Run], axis: Axis = SAMPLES) -> bytes:
    """The PNG for a page, which has title and notes itself."""
    png = io.BytesIO()
    static(dataclasses.replace(item, title=""), runs, (), axis).savefig(png, dpi=DPI)
    return png.getvalue()


def static(
    item: Item, runs: list[Run], notes: Sequence[str] = (), axis: Axis = SAMPLES
) -> "Figure":
    """The item as a matplotlib figure on a white ground."""
    if item.kind == "plane":
        from gaf_lab.paper.plane import drawn  # it imports torch

        return drawn(item, notes)
    if not has_anything(item, runs):
        return nothing(item, notes)
    if item.kind == "table":
        return tabular(item, runs, notes)
    return (
        over_training(item, runs, notes, axis)
        if item.kind == "curves"
        else against(item, runs, notes)
    )


def has_anything(item: Item, runs: list[Run]) -> bool:
    """Whether the runs have a value for any panel of the item."""
    if item.kind == "curves":
        return any(panels_of(item, runs))
    return bool(rows_of(item, runs)) if item.kind == "against" else bool(runs)


def nothing(item: Item, notes: Sequence[str]) -> "Figure":
    """A sheet with title and notes, and the sentence that there is nothing to draw."""
    below = head_height(heading(item), notes, 8.0) + 0.15
    height = below + 0.45
    figure = canvas(8.0, height)
    write_head(figure, heading(item), notes)
    figure.text(0.2 / 8.0, 1 - below / height, NOTHING, va="top", fontsize=11, color=INK)
    return figure


def has_values(of: list[Arm], panel: Panel) -> bool:
    return any(st.values_along(run, panel.key)[0].size for arm in of for run in arm.runs)


def panels_of(item: Item, runs: list[Run]) -> list[Panel]:
    """The panels of a figure over training that some run has values for."""
    groups = grouped(item, runs).values()
    return [panel for panel in chart_of(item).panels if any(has_values(of, panel) for of in groups)]


def over_training(item: Item, runs: list[Run], notes: Sequence[str], axis: Axis) -> "Figure":
    """A row for each key, a column for each network and data set; no axes where nothing was recorded."""
    groups, chart, axis = grouped(item, runs), chart_of(item), fit_axis(axis, runs)
    panels = panels_of(item, runs)
    colours = palette(names_of(item, runs))
    marks = (
        ["○: selected on noisy held-out labels."]
        if "test_accuracy" in item.keys and len(colours) <= CROWD
        else []
    )
    marks += ["◇: the paper's value."] if any(item.paper.values()) else []
    columns, right = len(groups), margin(list(colours))
    tall = max(2.3, 0.2 * (len(colours) + 1))
    figure, axes = sheet(
        item,
        [*notes, *marks],
        8.0 if columns == 1 else 5.0 * columns,
        [tall] * len(panels),
        0.72,
        right,
        columns,
    )
    for column, (x, of) in enumerate(groups.items()):
        for row, panel in enumerate(panels):
            ax, fit = axes[row][column], fitting(chart, panel)
            if not has_values(of, panel):
                ax.remove()
                continue
            ends = draw_arms(ax, of, panel, fit, axis, colours)
            title_axes(ax, panel.label, fit, of)
            ax.set_title("", loc="right")
            for arm in of:
                mean, value = (
                    st.curve(arm, panel.key, axis.key),
                    printed(item, arm.name, x, panel.key),
                )
                if mean is not None and value is not None:
                    diamonds(
                        ax,
                        [mean.x[-1] / axis.unit],
                        [value * panel.factor],
                        colours[arm.name].light,
                    )
            label_ends(ax, ends + (draw_taus(ax, of, colours) if fit.thresholds else []))
        axes[-1][column].set_xlabel(axis.label, fontsize=10.5, color=SOFT, labelpad=6)
        if columns > 1:
            above = axes[0][column].get_position()
            figure.text(
                above.x0,
                above.y1 + 0.42 / figure.get_figheight(),
                str(x),
                fontsize=11,
                fontweight="bold",
                color=INK,
            )
    return figure


def diamonds(ax: "Axes", x: Sequence[Any], y: Sequence[float], colour: str) -> None:
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


# --- against a field of the config -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One arm in one measure, in the measure's panel units.

    Attributes:
        mean: (place, mean, deviation or None, n) along the axis.
        dots: (place, value) of single seeds.
        paper: (place, value) that the paper prints.
        everywhere: whether x says nothing to the arm, so that it is drawn as a line all along.
    """

    arm: str
    mean: list[tuple[Place, float, float | None, int]]
    dots: list[tuple[Place, float]]
    paper: list[tuple[Place, float]]
    everywhere: bool


def series(item: Item, runs: list[Run], key: str, measure: Measure) -> list[Series]:
    groups, factor = grouped(item, runs), PANELS[key].factor
    found = []
    for name in names_of(item, runs):
        at = [(x, arm) for x, arms in groups.items() for arm in arms if arm.name == name]
        spreads = [
            (x, spread)
            for x, arm in at
            if (spread := st.spread_over_seeds(arm, measure)) is not None
        ]
        mean = [
            (x, s.mean * factor, None if s.deviation is None else s.deviation * factor, s.n)
            for x, s in spreads
        ]
        dots = [
            (x, value * factor)
            for x, arm in at
            for value in st.values_by_seed(arm.counted_runs, measure).values()
        ]
        paper = [
            (x, v * factor)
            for x in ordered([*item.paper.get(name, {})])
            if (v := printed(item, name, x, key)) is not None
        ]
        found.append(
            Series(name, mean, dots, paper, any(serves_everywhere(item, arm) for _, arm in at))
        )
    return found


def positions(item: Item, runs: list[Run]) -> dict[Place, float]:
    """Where each place stands on the axis: noise by its share in %, b by its logarithm, tau one after the other; words at the end."""
    places = ordered([*grouped(item, runs), *(x for row in item.paper.values() for x in row)])
    numbers = [x for x in places if not isinstance(x, str)]
    along = {"noise_rate": lambda x: 100 * x, "tau": numbers.index, "b": math.log2}[item.x or ""]
    found: dict[Place, float] = {x: float(along(x)) for x in numbers}
    step = (max(found.values()) - min(found.values())) / max(1, len(found) - 1) if found else 1.0
    end = max(found.values(), default=0.0)
    return found | {
        x: end + step * (i + 1) for i, x in enumerate(x for x in places if isinstance(x, str))
    }


def ticks(item: Item, places: Sequence[Place]) -> list[str]:
    return [
        x if isinstance(x, str) else f"{100 * x:g}" if item.x == "noise_rate" else f"{x:g}"
        for x in places
    ]


def rows_of(item: Item, runs: list[Run]) -> list[tuple[str, Measure]]:
    """The panels of a figure against a field, from above: last and selected for accuracy; mean and last for distances.

    Those that no run has a value for are left out.
    """
    arms = [arm for of in grouped(item, runs).values() for arm in of]
    return [
        (key, measure)
        for key in item.keys
        for measure in PANEL_MEASURES[key]
        if measure.name != "lowest" and any(st.spread_over_seeds(arm, measure) for arm in arms)
    ]


def titled(key: str, measure: Measure) -> str:
    return measure.label + (f" ({PANELS[key].unit})" if PANELS[key].unit else "")


def against(item: Item, runs: list[Run], notes: Sequence[str]) -> "Figure":
    at, rows = positions(item, runs), rows_of(item, runs)
    colours = palette(names_of(item, runs))
    tall = max(2.3, 0.2 * (len(colours) + 1))
    figure, grid = sheet(item, notes, 8.0, [tall] * len(rows), 0.72, margin(list(colours)))
    axes = [ax for (ax,) in grid]
    found = [series(item, runs, key, measure) for key, measure in rows]
    short = short_names([*colours])
    drawn = [
        [along(ax, one, at, short[one.arm], colours[one.arm].light) for one in of]
        for ax, of in zip(axes, found, strict=True)
    ]
    level([ax for ax, (_, measure) in zip(axes, rows, strict=True) if measure.unit == "share"])
    for i, ((key, measure), ax, ends) in enumerate(zip(rows, axes, drawn, strict=True)):
        plain_axes(ax)
        ax.set_title(titled(key, measure), loc="left", fontsize=11, color=INK, pad=8)
        if i == 0:
            ax.set_title(
                KEY if any(item.paper.values()) else KEY.partition("   ")[2],
                loc="right",
                fontsize=9,
                color=SOFT,
                pad=8,
            )
        ax.set_xticks(list(at.values()), ticks(item, list(at)))
        label_ends(ax, [label for label in ends if label is not None])
    axes[-1].set_xlabel(ACROSS[item.x or ""], fontsize=10.5, color=SOFT, labelpad=6)
    return figure


def along(ax: "Axes", one: Series, at: dict[Place, float], name: str, colour: str) -> Label | None:
    """Draws an arm along the axis. Returns its name for the line's end, None without a value."""
    diamonds(ax, [at[x] for x, _ in one.paper], [value for _, value in one.paper], colour)
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


# --- as a table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the paper's table: a name, the arm whose colour it has, None for a difference, and (value, beneath it) by column."""

    name: str
    arm: str | None
    cells: list[tuple[str, str]]
    paper: bool = False


def columns_of(item: Item, runs: list[Run]) -> list[Place]:
    """The columns that were run; without runs the paper's."""
    return ordered([*grouped(item, runs)] or [x for row in item.paper.values() for x in row])


def columns_not_run(item: Item, runs: list[Run]) -> list[str]:
    """A sentence on those of the paper's columns that were not run, where there are any."""
    papers = ordered([x for row in item.paper.values() for x in row])
    missing = ticks(item, [x for x in papers if x not in columns_of(item, runs)])
    return [f"Not run here: the paper's columns {', '.join(missing)}."] if missing else []


def blocks(item: Item, runs: list[Run]) -> list[tuple[str, list[Row]]]:
    """The table, once for each measure of its key: the arms, what GAF has beyond the others, and the paper's lines beneath."""
    groups, columns, key = grouped(item, runs), columns_of(item, runs), item.keys[0]
    at = {(x, arm.name): arm for x, arms in groups.items() for arm in arms}
    found = []
    for measure in PANEL_MEASURES[key]:
        rows: list[Row] = []
        if runs and not any(st.spread_over_seeds(arm, measure) for arm in at.values()):
            continue
        for name in names_of(item, runs):
            spreads = [
                st.spread_over_seeds(at[x, name], measure) if (x, name) in at else None
                for x in columns
            ]
            rows.append(Row(name, name, [spread_as_text(spread, measure) for spread in spreads]))
        gaps = {(x, gap.arm, gap.other): gap for x, gap in differences(item, runs, measure)}
        for one, other in dict.fromkeys((one, other) for _, one, other in gaps):
            if (one, other) == ("GAF", BASELINE) or other in CONTROLS:
                rows.append(
                    Row(
                        f"{one} {MINUS} {other}",
                        None,
                        [gap_cell(gaps.get((x, one, other))) for x in columns],
                    )
                )
        rows += [
            Row(
                f"{name}, paper",
                name,
                [(NONE if (v := line.get(x)) is None else f"{100 * v:g}", "") for x in columns],
                paper=True,
            )
            for name, line in item.paper.items()
        ]
        found.append((titled(key, measure), rows))
    return found


# those that tell agreement from fewer steps and from smaller batches
CONTROLS = ("random subset", "replay skip")


def gap_cell(gap: Difference | None) -> tuple[str, str]:
    if gap is None:
        return NONE, ""
    interval = (
        ""
        if gap.low is None or gap.high is None
        else f"{signed(100 * gap.low)} to {signed(100 * gap.high)}"
    )
    return signed(100 * gap.mean), interval


def tabular(item: Item, runs: list[Run], notes: Sequence[str]) -> "Figure":
    """The table as a picture."""
    columns, found = ticks(item, columns_of(item, runs)), blocks(item, runs)
    colours = palette([*dict.fromkeys(row.arm for _, rows in found for row in rows if row.arm)])
    line, wide = 0.3, 0.92
    names = (
        max([12, *(len(shorten(row.name, 34)) for _, rows in found for row in rows)]) * 0.083 + 0.45
    )
    width = max(8.0, names + wide * len(columns) + 0.2)
    wide = (width - names - 0.3) / len(columns)
    heights = [
        line * (1.6 + sum(1.35 if row.arm is None else 1 for row in rows)) for _, rows in found
    ]
    said = [*notes, *columns_not_run(item, runs), *MEANT]
    top = head_height(heading(item), said, width) + 0.5
    height = top + sum(heights) + 0.2
    figure = canvas(width, height)
    write_head(figure, heading(item), said)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="center", parse_math=False, **style)

    def rule(y: float, colour: str) -> None:
        from matplotlib.lines import Line2D

        figure.add_artist(
            Line2D(
                [0.2 / width, 1 - 0.2 / width], [1 - y / height] * 2, color=colour, linewidth=0.8
            )
        )

    for j, text in enumerate(columns):
        write(
            names + wide * (j + 0.5),
            top - 0.18,
            text if text == HUMAN_COLUMN else f"{text}%",
            ha="center",
            fontsize=9.5,
            color=SOFT,
        )
    write(0.2, top - 0.18, "label error", fontsize=9.5, color=SOFT)
    y = top
    for label, rows in found:
        rule(y, SOFT)
        write(0.2, y + line * 0.75, label, fontsize=10, fontweight="bold", color=INK)
        y += line * 1.4
        for row in rows:
            tall = line * (1.35 if row.arm is None else 1)
            colour = INK if row.arm is None else colours[row.arm].light
            write(
                0.2,
                y + tall / 2,
                "◇" if row.paper else "●" if row.arm else "",
                fontsize=10,
                color=colour,
            )
            write(
                0.42,
                y + tall / 2,
                shorten(row.name, 34),
                fontsize=9.5,
                color=SOFT if row.paper else INK,
            )
            for j, (value, beneath) in enumerate(row.cells):
                x, one = names + wide * (j + 0.5), row.arm is None and beneath
                shown = value if one else f"{value} {beneath}".strip()
                write(
                    x,
                    y + tall * (0.32 if one else 0.5),
                    shown,
                    ha="center",
                    fontsize=9.5,
                    color=SOFT if row.paper else INK,
                )
                if one:
                    write(x, y + tall * 0.72, beneath, ha="center", fontsize=7, color=SOFT)
            y += tall
        y += line * 0.2
    return figure


# --- interactive -------------------------------------------------------------------------------------------------


def interactive(item: Item, runs: list[Run], axis: Axis = SAMPLES) -> Any:
    """The same as a `plotly.graph_objects.Figure`; None for tables and the plane, and without runs.

    Traces carry `meta` as in `gaf_lab.report.figures.interactive`, and in it "paper": whether they are the paper's values.
    """
    if item.kind in ("table", "plane") or not has_anything(item, runs):
        return None
    return (
        training(item, runs, fit_axis(axis, runs))
        if item.kind == "curves"
        else points_along(item, runs)
    )


def training(item: Item, runs: list[Run], axis: Axis) -> Any:
    groups, chart = grouped(item, runs), chart_of(item)
    colours = palette(names_of(item, runs))
    cells = [
        (x, of, panel)
        for panel in chart.panels
        for x, of in groups.items()
        if has_values(of, panel)
    ]
    titles = [panel.label + (f"<br>{x}" if len(groups) > 1 else "") for x, _, panel in cells]
    figure = stack_panels(titles, axis.label, [fitting(chart, panel).zero for *_, panel in cells])
    for row, (x, of, panel) in enumerate(cells, 1):
        fit = fitting(chart, panel)
        for arm in sorted(of, key=is_gaf):
            shade = colours[arm.name]
            made = arm_traces(arm, panel, fit, axis, shade, first=False)
            mean, value = st.curve(arm, panel.key, axis.key), printed(item, arm.name, x, panel.key)
            if mean is not None and value is not None:
                made.append(
                    hollow(
                        arm.name,
                        shade,
                        [float(mean.x[-1] / axis.unit)],
                        [value * panel.factor],
                        panel,
                    )
                )
            for trace in made:
                figure.add_trace(trace, row=row, col=1)
        for tau in thresholds(of) if fit.thresholds else ():
            add_tau_line(figure, tau, row)
    figure.update_xaxes(unifiedhovertitle_text=axis.hover)
    return figure


def hollow(arm: str, shade: Shade, x: list[float], y: list[float], panel: Panel) -> dict[str, Any]:
    """The paper's values of an arm."""
    common = trace_base(arm, shade)
    marker = {"symbol": "diamond-open", "size": 10, "color": shade.light, "line": {"width": 2}}
    hover = f"{common['name']}, paper: %{{y:.{panel.digits}f}}{panel.unit}<extra></extra>"
    paper = {
        "meta": common["meta"] | {"paper": True},
        "mode": "markers",
        "marker": marker,
        "hovertemplate": hover,
    }
    return common | paper | {"x": x, "y": [round(value, 5) for value in y]}


def points_along(item: Item, runs: list[Run]) -> Any:
    at, rows = positions(item, runs), rows_of(item, runs)
    colours = palette(names_of(item, runs))
    figure = stack_panels(
        [titled(key, measure) for key, measure in rows], ACROSS[item.x or ""], [False] * len(rows)
    )
    for row, (key, measure) in enumerate(rows, 1):
        found = series(item, runs, key, measure)
        for one in found:
            for trace in plotted(one, at, colours[one.arm], PANELS[key]):
                figure.add_trace(trace, row=row, col=1)
    texts = dict(zip(at.values(), ticks(item, list(at)), strict=True))
    figure.update_xaxes(
        tickvals=list(texts), ticktext=list(texts.values()), tickangle=0, tickfont_size=11
    )
    return figure


def plotted(
    one: Series, at: dict[Place, float], shade: Shade, panel: Panel
) -> list[dict[str, Any]]:
    """The traces of an arm: the mean, single seeds, the paper."""
    common, digits = trace_base(one.arm, shade), panel.digits
    single = {
        "meta": common["meta"] | {"single": True},
        "mode": "markers",
        "hoverinfo": "skip",
        "opacity": 0.4,
    }
    dots = {
        "x": [at[x] for x, _ in one.dots],
        "y": [round(value, 5) for _, value in one.dots],
        "marker": {"size": 5, "color": shade.light},
    }
    made: list[dict[str, Any]] = [common | single | dots]
    if one.mean:
        texts = [
            f"{mean:.{digits}f}{panel.unit}"
            + ("" if deviation is None else f" ± {deviation:.{digits}f} (n = {n})")
            for _, mean, deviation, n in one.mean
        ]
        x, y = [at[x] for x, *_ in one.mean], [round(mean, 5) for _, mean, *_ in one.mean]
        line, marker = {"color": shade.light, "width": 3}, {"size": 8, "color": shade.light}
        hover = {"text": texts, "hovertemplate": "%{fullData.name}: %{text}<extra></extra>"}
        made.append(
            common
            | hover
            | {"mode": "lines+markers", "x": x, "y": y, "line": line, "marker": marker}
        )
        if one.everywhere:
            ends = [min(at.values()), max(at.values())]
            dash = {
                "mode": "lines",
                "x": ends,
                "y": [y[0]] * 2,
                "line": line | {"width": 1.5, "dash": "dash"},
                "hoverinfo": "skip",
            }
            made.append(common | dash)
    if one.paper:
        made.append(
            hollow(
                one.arm,
                shade,
                [at[x] for x, _ in one.paper],
                [value for _, value in one.paper],
                panel,
            )
        )
    return [trace for trace in made if trace["x"]]
