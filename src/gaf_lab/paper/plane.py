"""The idea in two dimensions: a real run of the rule on a model of two weights, whose gradients can be drawn as they are.

Logistic regression in the plane, 40% of the labels flipped, k micro-batches a step, aggregated by `gaf.aggregate`. Every
arrow, cone and weight of the picture is a number of this run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import gaf
from gaf.rules.contract import Policy
from gaf_lab.data.sampling import generator
from gaf_lab.paper.items import Item
from gaf_lab.paper.sheet import head_height, heading, write_head
from gaf_lab.report.figures import canvas
from gaf_lab.report.palette import GRID, INK, KNOWN, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES, RATE, K, B, TAU, LR, STEPS = 2000, 0.4, 6, 8, 0.5, 0.5, 100
TEACHER = (2.0, 1.5)  # labels are drawn from the logistic model with these weights
START = (-1.2, 1.9)
ACCEPTED, REJECTED, AVERAGE = KNOWN["GAF"].light, "#c23b3b", KNOWN["averaging"].light
NOTES = (
    f"Logistic regression with two weights, {RATE:.0%} of {SAMPLES:,} labels flipped, k = {K} micro-batches of b = {B}, τ = {TAU:g}, "
    f"SGD {LR:g}; {STEPS} steps of each on the same micro-batches.",
    "It shows the rule and no gain: two weights cannot memorise, and both ways end about where the loss of the given labels is least.",
)


@dataclass(frozen=True)
class Problem:
    """x (n, 2) from a normal distribution, true labels (n,) drawn from the teacher's probabilities, and the labels given (n,); float64."""

    x: Tensor
    true: Tensor
    given: Tensor

    def gradient(self, w: Tensor, index: Tensor) -> Tensor:
        """Of the mean logistic loss of some samples under their given labels, (2,)."""
        x, y = self.x[index], self.given[index]
        return x.T @ (torch.sigmoid(x @ w) - y) / len(x)

    def loss(self, w: Tensor, y: Tensor) -> Tensor:
        """Mean logistic loss over all samples with labels y, for weights w (..., 2): (...)."""
        scores = w @ self.x.T
        return (torch.nn.functional.softplus(scores) - scores * y).mean(-1)

    def optimum(self, y: Tensor) -> Tensor:
        """The weights (2,) at which the gradient under labels y vanishes, by Newton's method."""
        w = self.x.new_zeros(2)
        for _ in range(50):
            p = torch.sigmoid(self.x @ w)
            hessian = (self.x * (p * (1 - p))[:, None]).T @ self.x / len(self.x)
            w = w - torch.linalg.solve(hessian, self.x.T @ (p - y) / len(self.x))
        return w


def make(seed: int = 0) -> Problem:
    draw = generator(seed, "plane")
    x = torch.randn(SAMPLES, 2, generator=draw, dtype=torch.float64)
    chance = torch.sigmoid(x @ torch.tensor(TEACHER, dtype=torch.float64))
    true = (torch.rand(SAMPLES, generator=draw, dtype=torch.float64) < chance).double()
    flipped = torch.randperm(SAMPLES, generator=draw)[: int(RATE * SAMPLES)]
    given = true.clone()
    given[flipped] = 1 - given[flipped]
    return Problem(x, true, given)


@dataclass(frozen=True)
class Step:
    """Weights w (2,), the micro-gradients there (k, 2), the update, and what was decided."""

    w: Tensor
    rows: Tensor
    update: Tensor
    decision: gaf.Decision


def descend(problem: Problem, policy: Policy, seed: int = 0) -> list[Step]:
    """STEPS steps of SGD at LR from START; the micro-batches are the same for every policy."""
    draw = generator(seed, "plane batches")
    w = torch.tensor(START, dtype=torch.float64)
    steps = []
    for _ in range(STEPS):
        batches = torch.randint(SAMPLES, (K, B), generator=draw)
        rows = torch.stack([problem.gradient(w, index) for index in batches])
        update, decision = gaf.aggregate(rows, policy)
        steps.append(Step(w, rows, update, decision))
        w = w - LR * update
    return steps


def shown(steps: list[Step]) -> int:
    """The first step that accepts half of its micro-gradients, of which the second is one."""
    return next(
        i
        for i, step in enumerate(steps)
        if int(step.decision.accepted.sum()) == K // 2 and bool(step.decision.accepted[1])
    )


# --- the picture -------------------------------------------------------------------------------------------------


def drawn(item: Item, notes: Sequence[str]) -> "Figure":
    """Above: one step, micro-gradient by micro-gradient, each against the running sum and the cone of what is accepted.
    Beneath: what averaging and GAF make of them, and the way that each takes over the loss of the given labels."""
    problem = make()
    filtered, averaged = descend(problem, gaf.GAF(TAU)), descend(problem, gaf.Mean())
    number = shown(filtered)
    step = filtered[number]
    said = [*NOTES, *notes]
    small, large, width = 1.5, 3.5, 10.0
    top = head_height(heading(item), said, width) + 0.75
    height = top + small + 0.95 + large + 0.6
    figure = canvas(width, height)
    write_head(figure, heading(item), said)

    def place(x: float, y: float, wide: float, tall: float) -> "Axes":
        return figure.add_axes((x / width, 1 - (y + tall) / height, wide / width, tall / height))

    def caption(x: float, y: float, text: str) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=11, color=INK, va="bottom")

    caption(
        0.2,
        top - 0.4,
        f"Step {number + 1} of GAF: does each micro-gradient lie in the cone (distance ≤ τ) around those accepted before it (black)?",
    )
    reach = 1.12 * float(step.rows.norm(dim=1).max())
    for i in range(K):
        visit(
            place(0.2 + i * (width - 0.4) / K, top, (width - 0.4) / K - 0.12, small), step, i, reach
        )
    below = top + small + 0.95
    caption(0.2, below - 0.12, "What is made of them")
    outcome(place(0.2, below, large, large), step, reach)
    caption(4.3, below - 0.12, "The way over the loss of the given labels")
    ways(
        place(4.3, below, width - 4.3 - 0.5, large),
        problem,
        {"averaging": averaged, "GAF": filtered},
        number,
    )
    return figure


def bare(ax: "Axes", reach: float) -> None:
    """A square plane around 0, without numbers: of these arrows only directions and ratios matter."""
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    ax.set_anchor("W")
    for spine in ax.spines.values():
        spine.set_color(GRID)
    ax.axhline(0, color=GRID, linewidth=0.8, zorder=0)
    ax.axvline(0, color=GRID, linewidth=0.8, zorder=0)


def arrow(ax: "Axes", to: Tensor, colour: str, width: float = 1.8, **style: Any) -> None:
    """From 0 to a point (2,)."""
    shape = {
        "arrowstyle": "-|>,head_width=0.22,head_length=0.45",
        "shrinkA": 0,
        "shrinkB": 0,
        "color": colour,
        "linewidth": width,
    }
    ax.annotate("", xy=tuple(to.tolist()), xytext=(0, 0), arrowprops=shape | style)


def visit(ax: "Axes", step: Step, i: int, reach: float) -> None:
    """Micro-gradient i, as the direction of descent that it asks for, and the mean of those accepted before it with its cone."""
    from matplotlib.patches import Wedge

    bare(ax, reach)
    row, accepted = -step.rows[i], bool(step.decision.accepted[i])
    before = step.rows[:i][step.decision.accepted[:i]]
    if i:
        towards = -before.mean(0)
        angle, half = (
            math.degrees(math.atan2(float(towards[1]), float(towards[0]))),
            math.degrees(math.acos(1 - TAU)),
        )
        ax.add_patch(
            Wedge(
                (0, 0),
                0.97 * reach,
                angle - half,
                angle + half,
                facecolor=ACCEPTED,
                alpha=0.12,
                edgecolor="none",
            )
        )
        arrow(ax, towards, INK, 1.2, linestyle="-", alpha=0.75)
    arrow(ax, row, ACCEPTED if accepted else REJECTED, 2.2)
    word = (
        "starts the sum"
        if i == 0
        else f"distance {float(step.decision.distances[i]):.2f}: {'accepted' if accepted else 'rejected'}"
    )
    ax.set_title(f"{i + 1}", loc="left", fontsize=10, fontweight="bold", color=SOFT, pad=3)
    ax.set_xlabel(word, fontsize=8.5, color=ACCEPTED if accepted else REJECTED, labelpad=5)


def outcome(ax: "Axes", step: Step, reach: float) -> None:
    """All micro-gradients; their average, and GAF's update."""
    bare(ax, reach)
    for row, accepted in zip(-step.rows, step.decision.accepted.tolist(), strict=True):
        arrow(ax, row, ACCEPTED if accepted else REJECTED, 1.3, alpha=0.45)
    arrow(ax, -step.rows.mean(0), AVERAGE, 3.5)
    arrow(ax, -step.update, ACCEPTED, 3.5)
    keys = (
        ("accepted", ACCEPTED, 1.3),
        ("rejected", REJECTED, 1.3),
        ("average of all", AVERAGE, 3.5),
        ("GAF's update", ACCEPTED, 3.5),
    )
    key(ax, keys)


def key(ax: "Axes", entries: Sequence[tuple[str, str, float]]) -> None:
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


def ways(ax: "Axes", problem: Problem, runs: dict[str, list[Step]], number: int) -> None:
    """Contours of the loss, and the weights of each run; the step that is shown above has a ring."""
    best, wanted = problem.optimum(problem.given), problem.optimum(problem.true)
    x, y = (
        torch.linspace(-1.6, 2.6, 120, dtype=torch.float64),
        torch.linspace(-0.7, 2.2, 90, dtype=torch.float64),
    )
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
    for spot, text, shift in ((at, f"step {number + 1}", (-48, -12)), (START, "start", (8, 4))):
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
    key(ax, [(name, KNOWN[name].light, 2.2) for name in runs])
