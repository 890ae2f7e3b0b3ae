"""The figure of `gaf probe`: distances, acceptance against tau, and distances by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaf_lab.experiments.probe_point import BINS, CURVE_TAUS, ProbeLine
from gaf_lab.records.output import replace_whole
from gaf_lab.report.figures import DPI, canvas, plain_axes
from gaf_lab.report.palette import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {1: "#1559c9", 2: "#12a08a", 4: "#e0561b", 8: "#8c1d4f"}  # by m


def draw_probe(lines: Sequence[ProbeLine], path: Path) -> None:
    """Draws a row of three panels for each number of steps. A PNG of 150 dpi."""
    states = list(dict.fromkeys(line["after"] for line in lines))
    height = max(3.3, 1.2 + 0.17 * max(len(line["layers"]) for line in lines))
    total = height * len(states)
    figure = canvas(12.5, total)
    axes = figure.subplots(len(states), 3, squeeze=False, width_ratios=(1, 1.15, 1))
    figure.subplots_adjust(
        left=0.035,
        right=0.985,
        top=1 - 0.62 / total,
        bottom=0.6 / total,
        wspace=0.28,
        hspace=1.15 / (height - 1.15),
    )
    for row, after in zip(axes, states, strict=True):
        group = [line for line in lines if line["after"] == after]
        draw_distances(row[0], group)
        draw_acceptance(row[1], group)
        draw_layers(row[2], group[0])
    with replace_whole(path) as part:
        figure.savefig(part, dpi=DPI)


def draw_distances(ax: "Axes", group: Sequence[ProbeLine]) -> None:
    """Cosine distances of pairs, at b and its largest multiple."""
    highest = 0.0
    edges = [2 * i / BINS for i in range(BINS + 1)]
    for line in {line["m"]: line for line in (group[0], group[-1])}.values():
        color = SHADES[line["m"]]
        share = [100 * count / sum(line["bins"]) for count in line["bins"]]
        ax.stairs(share, edges, fill=True, alpha=0.35, color=color, label=f"b = {line['b']}")
        dotted: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (1, 1.5))}
        ax.axvline(line["distance_expected"], ymax=0.85, color=color, **dotted)
        highest = max(highest, *share)
    plain_axes(ax)
    ax.set(xlim=(0, 1.3), ylim=(0, 1.25 * highest))
    state = f"after {group[0]['after']:,} steps" if group[0]["after"] else "initial weights"
    ax.set_title(
        f"{state}: pairs of micro-gradients (%)", loc="left", fontsize=11, color=INK, pad=8
    )
    ax.set_xlabel("cosine distance (dotted: B / (b + B))", fontsize=10, color=SOFT)
    legend_on_top(ax)


def draw_acceptance(ax: "Axes", group: Sequence[ProbeLine]) -> None:
    """Acceptance against tau.

    Lines are predicted from the first half of the rows at b, dots are measured on the second.
    """
    for line in group:
        color = SHADES[line["m"]]
        taus, predicted, measured, _ = (list(values) for values in zip(*line["curve"], strict=True))
        ax.plot(
            taus,
            [100 * share for share in predicted],
            color=color,
            linewidth=1.8,
            label=f"b = {line['b']}",
        )
        dots: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.3}
        ax.plot(taus, [100 * share for share in measured], "o", color=color, markersize=3.4, **dots)
    plain_axes(ax)
    tau = group[0]["tau"]
    ax.axvline(tau, ymax=100 / 122, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    ax.set(xlim=(CURVE_TAUS[0], CURVE_TAUS[-1]), ylim=(0, 122), yticks=range(0, 101, 20))
    ax.set_title("accepted (%)", loc="left", fontsize=11, color=INK, pad=8)
    ax.set_title(f"dashed: the estimate, τ = {tau:.3f}", loc="right", fontsize=9, color=SOFT, pad=8)
    ax.set_xlabel("τ (lines: predicted from b, B, d_eff; dots: measured)", fontsize=10, color=SOFT)
    legend_on_top(ax)


def draw_layers(ax: "Axes", line: ProbeLine) -> None:
    """10%, 50% and 90% of the distances in each layer, the first on top."""
    color = SHADES[1]
    parts = [part for part in line["layers"] if part["distance"][1] is not None]
    for i, part in enumerate(parts):
        low, middle, high = part["distance"]
        ax.plot([low, high], [i, i], color=color, linewidth=2, alpha=0.45, solid_capstyle="round")
        ax.plot([middle], [i], "o", color=color, markersize=5)
    low, middle, high = line["distance"]
    ax.axvspan(low, high, color=INK, alpha=0.06, linewidth=0)
    ax.axvline(middle, color=INK, linewidth=1)
    plain_axes(ax)
    ax.grid(visible=False, axis="y")
    ax.set_ylim(len(parts) - 0.4, -0.6)
    ax.set_yticks(range(len(parts)), [part["name"] for part in parts], fontsize=9)
    ax.set_title(f"by layer, b = {line['b']}", loc="left", fontsize=11, color=INK, pad=8)
    ax.set_title("10%, 50%, 90%; grey: all", loc="right", fontsize=9, color=SOFT, pad=8)
    ax.set_xlabel("cosine distance", fontsize=10, color=SOFT)


def legend_on_top(ax: "Axes", columns: int = 4) -> None:
    """A legend in the room that the y axis leaves above everything that is drawn."""
    ax.legend(
        frameon=False,
        fontsize=9.5,
        labelcolor=SOFT,
        loc="upper left",
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.4,
        borderaxespad=0.0,
    )
