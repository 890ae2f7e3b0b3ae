"""The idea in two dimensions: the picture of a real run, whose numbers are all that it shows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import gaf
from gaf_lab.paper.items import Item
from gaf_lab.paper.plane_run import (
    LR,
    RATE,
    SAMPLES,
    START_WEIGHTS,
    STEPS,
    TAU,
    B,
    K,
    PlaneProblem,
    PlaneStep,
    descend,
    make_plane_problem,
    step_to_show,
)
from gaf_lab.paper.plane_step import ACCEPTED, draw_key, draw_outcome, draw_visit
from gaf_lab.paper.sheet import head_height, heading, write_head
from gaf_lab.report.figures import canvas
from gaf_lab.report.palette import GRID, INK, KNOWN, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTES = (
    (
        f"Logistic regression with two weights, {RATE:.0%} of {SAMPLES:,} labels flipped, "
        f"k = {K} micro-batches of b = {B}, τ = {TAU:g}, SGD {LR:g}; {STEPS} steps of each on the "
        "same micro-batches."
    ),
    (
        "It shows the rule and no gain: two weights cannot memorise, and both ways end about where "
        "the loss of the given labels is least."
    ),
)


def draw_plane(item: Item, notes: Sequence[str]) -> "Figure":
    """The picture: one step, and the paths of averaging and GAF.

    Above, the step's micro-gradients one by one, each with the running sum before it and the cone
    of what is accepted. Beneath, the two updates, and the path of each over the loss.
    """
    problem = make_plane_problem()
    filtered, averaged = descend(problem, gaf.GAF(TAU)), descend(problem, gaf.Mean())
    number = step_to_show(filtered)
    step = filtered[number]
    all_notes = [*NOTES, *notes]
    small, large, width = 1.5, 3.5, 10.0
    top = head_height(heading(item), all_notes, width) + 0.75
    height = top + small + 0.95 + large + 0.6
    figure = canvas(width, height)
    write_head(figure, heading(item), all_notes)

    def place(x: float, y: float, wide: float, tall: float) -> "Axes":
        return figure.add_axes((x / width, 1 - (y + tall) / height, wide / width, tall / height))

    def caption(x: float, y: float, text: str) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=11, color=INK, va="bottom")

    caption(
        0.2,
        top - 0.4,
        (
            f"Step {number + 1} of GAF: does each micro-gradient lie in the cone (distance ≤ τ) "
            "around those accepted before it (black)?"
        ),
    )
    reach = 1.12 * float(step.rows.norm(dim=1).max())
    for i in range(K):
        draw_visit(
            place(0.2 + i * (width - 0.4) / K, top, (width - 0.4) / K - 0.12, small), step, i, reach
        )
    below = top + small + 0.95
    caption(0.2, below - 0.12, "What is made of them")
    draw_outcome(place(0.2, below, large, large), step, reach)
    caption(4.3, below - 0.12, "The way over the loss of the given labels")
    draw_paths(
        place(4.3, below, width - 4.3 - 0.5, large),
        problem,
        {"averaging": averaged, "GAF": filtered},
        number,
    )
    return figure


def draw_paths(
    ax: "Axes", problem: PlaneProblem, runs: dict[str, list[PlaneStep]], number: int
) -> None:
    """Draws contours of the loss and the weights of each run, with a ring at step `number`."""
    best, wanted = problem.optimum(problem.given), problem.optimum(problem.true)
    x = torch.linspace(-1.6, 2.6, 120, dtype=torch.float64)
    y = torch.linspace(-0.7, 2.2, 90, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    loss = problem.loss(grid, problem.given)
    ax.contour(
        x.numpy(), y.numpy(), loss.numpy(), levels=12, colors="#c9ccd3", linewidths=0.8, zorder=1
    )
    for name, steps in runs.items():
        path = torch.stack([step.w for step in steps])
        ax.plot(*path.T.tolist(), color=KNOWN[name].light, linewidth=1.5, alpha=0.85, zorder=3)
    at = runs["GAF"][number].w.tolist()
    ax.plot(
        *at,
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=ACCEPTED,
        markeredgewidth=1.6,
        zorder=5,
    )
    for spot, text, shift in (
        (at, f"step {number + 1}", (-48, -12)),
        (START_WEIGHTS, "start", (8, 4)),
    ):
        ax.annotate(
            text, tuple(spot), shift, textcoords="offset points", fontsize=9, color=INK, zorder=7
        )
    line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.8}
    for spot, text, shift in (
        (best.tolist(), "least loss, given labels", (14, -40)),
        (wanted.tolist(), "least loss, true labels", (-62, 14)),
    ):
        ax.plot(*spot, "*", markersize=13, color=INK, zorder=6)
        ax.annotate(
            text,
            tuple(spot),
            shift,
            textcoords="offset points",
            fontsize=9,
            color=INK,
            arrowprops=line,
            zorder=7,
        )
    ax.set(xlim=(-1.6, 2.6), ylim=(-0.7, 2.2))
    ax.set_xlabel("first weight", fontsize=9.5, color=SOFT)
    ax.set_ylabel("second weight", fontsize=9.5, color=SOFT)
    ax.yaxis.tick_right()
    ax.tick_params(colors=SOFT, labelsize=9, length=0)
    for spine in ax.spines.values():
        spine.set_color(GRID)
    draw_key(ax, [(name, KNOWN[name].light, 2.2) for name in runs])
