"""One step of the run in the plane, as arrows: micro-gradients with their cones, and updates."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gaf_lab.paper.plane_run import TAU, PlaneStep
from gaf_lab.report.palette import GRID, INK, KNOWN, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCEPTED, REJECTED, AVERAGE = KNOWN["GAF"].light, "#c23b3b", KNOWN["averaging"].light


def clear_axes(ax: "Axes", reach: float) -> None:
    """Makes a square plane around 0, without numbers: only directions and ratios matter."""
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    ax.set_anchor("W")
    for spine in ax.spines.values():
        spine.set_color(GRID)
    ax.axhline(0, color=GRID, linewidth=0.8, zorder=0)
    ax.axvline(0, color=GRID, linewidth=0.8, zorder=0)


def draw_arrow(ax: "Axes", to: Tensor, colour: str, width: float = 1.8, **style: Any) -> None:
    """Draws an arrow from 0 to a point (2,)."""
    shape = {
        "arrowstyle": "-|>,head_width=0.22,head_length=0.45",
        "shrinkA": 0,
        "shrinkB": 0,
        "color": colour,
        "linewidth": width,
    }
    ax.annotate("", xy=tuple(to.tolist()), xytext=(0, 0), arrowprops=shape | style)


def draw_visit(ax: "Axes", step: PlaneStep, i: int, reach: float) -> None:
    """Draws micro-gradient i, and the cone around the mean of those accepted before it.

    Arrows show directions of descent, so gradients have their sign changed.
    """
    from matplotlib.patches import Wedge

    clear_axes(ax, reach)
    row, accepted = -step.rows[i], bool(step.decision.accepted[i])
    before = step.rows[:i][step.decision.accepted[:i]]
    if i:
        towards = -before.mean(0)
        angle = math.degrees(math.atan2(float(towards[1]), float(towards[0])))
        half = math.degrees(math.acos(1 - TAU))
        ends = angle - half, angle + half
        style: dict[str, Any] = {"facecolor": ACCEPTED, "alpha": 0.12, "edgecolor": "none"}
        ax.add_patch(Wedge((0, 0), 0.97 * reach, *ends, **style))
        draw_arrow(ax, towards, INK, 1.2, linestyle="-", alpha=0.75)
    colour = ACCEPTED if accepted else REJECTED
    draw_arrow(ax, row, colour, 2.2)
    words = "starts the sum"
    if i:
        verdict = "accepted" if accepted else "rejected"
        words = f"distance {float(step.decision.distances[i]):.2f}: {verdict}"
    ax.set_title(f"{i + 1}", loc="left", fontsize=10, fontweight="bold", color=SOFT, pad=3)
    ax.set_xlabel(words, fontsize=8.5, color=colour, labelpad=5)


def draw_outcome(ax: "Axes", step: PlaneStep, reach: float) -> None:
    """Draws all micro-gradients, their average, and GAF's update."""
    clear_axes(ax, reach)
    for row, accepted in zip(-step.rows, step.decision.accepted.tolist(), strict=True):
        draw_arrow(ax, row, ACCEPTED if accepted else REJECTED, 1.3, alpha=0.45)
    draw_arrow(ax, -step.rows.mean(0), AVERAGE, 3.5)
    draw_arrow(ax, -step.update, ACCEPTED, 3.5)
    keys = (
        ("accepted", ACCEPTED, 1.3),
        ("rejected", REJECTED, 1.3),
        ("average of all", AVERAGE, 3.5),
        ("GAF's update", ACCEPTED, 3.5),
    )
    draw_key(ax, keys)


def draw_key(ax: "Axes", entries: Sequence[tuple[str, str, float]]) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colour, linewidth=width, alpha=0.6 if width < 2 else 1, label=name)
        for name, colour, width in entries
    ]
    ax.legend(
        handles=lines,
        loc="upper right",
        fontsize=9,
        frameon=True,
        facecolor="white",
        edgecolor="none",
        framealpha=0.85,
        labelcolor=INK,
    )
