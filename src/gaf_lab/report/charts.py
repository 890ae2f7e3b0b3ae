"""The figures of a report as descriptions, from which PNG and interactive ones are drawn.

Thin lines are single runs, bold ones the mean over an arm's seeds; runs that are not finished are
dashed. Of more than CROWD arms, single runs are left out. Each point of a grid, such as a noise
rate, has a panel of its own; a panel without values is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gaf_lab.records.run import Run
from gaf_lab.records.score import ACCURACY, Score
from gaf_lab.report.measures import PAIR_DISTANCE, last_value


class Axis(NamedTuple):
    """What values are drawn against."""

    key: str  # of the evaluations
    name: str
    label: str
    unit: float  # how much of the key is 1 on the axis
    hover: str  # the page's text at a point


SAMPLES = Axis(
    "samples", "samples seen", "samples seen (thousands)", 1000.0, "%{x:,.1f} thousand samples"
)
STEPS = Axis("steps_taken", "steps taken", "steps taken", 1.0, "%{x:,.0f} steps taken")
TIME = Axis("seconds", "time", "time (s)", 1.0, "%{x:,.1f} s")


def clock(longest: float) -> tuple[str, float]:
    """The unit that suits times of up to `longest` seconds, and its length in seconds."""
    if longest < 120:
        return "s", 1.0
    return ("min", 60.0) if longest < 7200 else ("h", 3600.0)


def fit_axis(axis: Axis, runs: list[Run]) -> Axis:
    """The axis; that of time in a unit that suits these runs."""
    if axis.key != TIME.key:
        return axis
    unit, second = clock(max((last_value(run, axis.key) or 0.0 for run in runs), default=0.0))
    return axis._replace(label=f"time ({unit})", unit=second, hover=f"%{{x:,.1f}} {unit}")


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a key of the evaluations, times `factor`; the label includes the unit."""

    key: str
    label: str
    factor: float
    unit: str
    digits: int


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        axes: what its values are drawn against; each gives a picture of its own.
        marks: whether each run's evaluation selected on held-out labels is marked.
        thresholds: whether GAF's tau is drawn, in the panel of distances to the running sum.
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
        """The picture's file name without .png; further axes are added: "accuracy-steps"."""
        return self.name if axis is self.axes[0] else f"{self.name}-{axis.name.split()[0]}"


def score_chart(score: Score) -> Chart:
    """The score on the test set."""
    panel = Panel(f"test_{score.key}", f"test {score.name}", 1.0, "", 4)
    if score.share:
        panel = Panel(f"test_{score.key}", f"test {score.name} (%)", 100.0, "%", 1)
    return Chart(
        score.key,
        f"{score.name[0].upper()}{score.name[1:]} on the test set",
        (panel,),
        "A circle marks the evaluation that each run's noisy held-out labels select.",
        axes=(SAMPLES, STEPS, TIME),
        marks=True,
    )


CHARTS = (
    score_chart(ACCURACY),
    Chart(
        "distance",
        "Cosine distance between micro-gradients",
        (
            Panel(PAIR_DISTANCE, "mean distance of two micro-gradients", 1.0, "", 3),
            Panel("distance_mean", "mean distance to the running sum", 1.0, "", 3),
        ),
        (
            "Mean over the steps between two evaluations; 0: same direction, 1: orthogonal. "
            "Distance of two micro-gradients: estimated from all that were compared, accepted or "
            "not, so it can be compared between arms. Distance to the running sum: under "
            "averaging that is the sum of all earlier micro-gradients, under GAF of the accepted "
            "ones. The same micro-gradients have another distance in another arm, so it cannot be "
            "compared between arms. Dashed: GAF's threshold τ, above which a micro-gradient is "
            "rejected."
        ),
        thresholds=True,
    ),
    Chart(
        "memorisation",
        "Memorisation of wrong labels",
        (
            Panel("memorised", "memorised (%)", 100.0, "%", 1),
            Panel("corrected", "corrected (%)", 100.0, "%", 1),
        ),
        (
            "Of the training samples with a flipped label: the share predicted as the wrong label "
            "(memorised) and as the true one (corrected)."
        ),
        zero=True,
    ),
)
OLDER = (
    "The records of {} are older and lack that estimate. Their curve shows B / (b + B) instead, "
    "from the noise scale B over the last 100 steps, cut at 1."
)


def caption_of(chart: Chart, runs: Sequence[Run]) -> str:
    """The chart's, with a note on older records."""
    if all(panel.key != PAIR_DISTANCE for panel in chart.panels):
        return chart.caption
    older = [run for run in runs if any(PAIR_DISTANCE not in line for line in run.evals)]
    if not older:
        return chart.caption
    which = "these runs" if len(older) == len(runs) else f"{len(older)} of {len(runs)} runs"
    return f"{chart.caption} {OLDER.format(which)}"
