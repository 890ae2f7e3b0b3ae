"""Numbers of single runs: values of their evaluations, and the measures that reports show.

Missing values (null in the records) are left out, never replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from gaf_lab.records.run import Run
from gaf_lab.records.score import ACCURACY, Score

# of an evaluation: mean cosine distance of two micro-gradients, whether or not the arm accepts them
PAIR_DISTANCE = "distance_pairs"

Unit = Literal["share", "distance", "seconds", "number"]


@dataclass(frozen=True)
class Measure:
    """A number per run.

    Attributes:
        unit: "share" in [0, 1], "distance" in [0, 2], "seconds", or "number" of any size.
        value: of a run; None if the run does not have it.
    """

    name: str
    label: str
    unit: Unit
    value: Callable[[Run], float | None]


def status(run: Run) -> str:
    """The status in the end line; "unfinished" without one: the run goes on, or was killed."""
    return str(run.end["status"]) if run.end else "unfinished"


def value_in(run: Run, line: dict[str, Any], key: str) -> float | None:
    """The value of a key in one of the run's evaluations; None without a value."""
    if key == PAIR_DISTANCE and PAIR_DISTANCE not in line:
        return estimated_pair_distance(run, line)
    value = line.get(key)
    return None if value is None else float(value)


def estimated_pair_distance(run: Run, line: dict[str, Any]) -> float | None:
    """Mean cosine distance of two micro-gradients, B / (b + B), from the noise scale B.

    For evaluations of older records, which lack the distance itself. An infinite noise scale is
    null in the records: no signal was found, the distance is 1 or more, and the result is 1.
    """
    if line.get("distance_mean") is None:  # nothing was compared
        return None
    noise, b = line.get("noise_scale"), run.header["config"].get("b")
    if "noise_scale" not in line or b is None:
        return None
    return 1.0 if noise is None else noise / (b + noise)


def values_of(run: Run, key: str) -> list[float]:
    """The values of a key in all evaluations that have one, in order."""
    values = (value_in(run, line, key) for line in run.evals)
    return [value for value in values if value is not None]


def last_value(run: Run, key: str) -> float | None:
    """The value at the last evaluation that has one."""
    values = values_of(run, key)
    return values[-1] if values else None


def lowest_value(run: Run, key: str) -> float | None:
    return min(values_of(run, key), default=None)


def mean_over_run(run: Run, key: str) -> float | None:
    """Mean over the run. Each evaluation weighs as much as the steps since the one before it."""
    steps = [0, *(line["step"] for line in run.evals)]
    weighted = []
    for line, before, after in zip(run.evals, steps, steps[1:], strict=False):
        value = value_in(run, line, key)
        if value is not None and after > before:
            weighted.append((value, after - before))
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else None


def selected_evaluation(run: Run) -> dict[str, Any] | None:
    """The evaluation that noisy held-out labels select; None if the run held nothing out."""
    if all(run.score.of(line, "heldout") is None for line in run.evals):
        return None
    return run.selected


def selected_score(run: Run) -> float | None:
    line = selected_evaluation(run)
    return None if line is None else run.score.of(line)


def last_score(run: Run) -> float | None:
    return last_value(run, f"test_{run.score.key}")


def share_of_steps(run: Run) -> float | None:
    """Steps taken over steps tried."""
    if not run.evals or not run.evals[-1]["step"]:
        return None
    share: float = run.evals[-1]["steps_taken"] / run.evals[-1]["step"]
    return share


def duration(run: Run) -> float | None:
    """Seconds; without an end line, until the last evaluation."""
    seconds = run.end.get("seconds") if run.end else None
    return last_value(run, "seconds") if seconds is None else float(seconds)


def last_of(key: str, label: str) -> Measure:
    """The share under a key at the last evaluation."""
    return Measure(key, label, "share", lambda run: last_value(run, key))


@lru_cache
def score_measures(score: Score) -> tuple[Measure, Measure]:
    """A score at the last evaluation, and at the one that noisy held-out labels select."""
    unit: Unit = "share" if score.share else "number"
    return (
        Measure("last", f"test {score.name}, last", unit, last_score),
        Measure("selected", f"test {score.name}, selected on held-out", unit, selected_score),
    )


LAST, SELECTED = score_measures(ACCURACY)
MEMORISED = last_of("memorised", "memorised")
CORRECTED = last_of("corrected", "corrected")
ACCEPTANCE = Measure(
    "acceptance", "accepted", "share", lambda run: mean_over_run(run, "acceptance")
)
STEPS_TAKEN = Measure("steps_taken", "steps taken", "share", share_of_steps)
SECONDS = Measure("seconds", "time", "seconds", duration)


def shown_measures(score: Score) -> tuple[Measure, ...]:
    """The columns of a table of results."""
    last, selected = score_measures(score)
    return selected, last, MEMORISED, CORRECTED, ACCEPTANCE, STEPS_TAKEN, SECONDS


def compared_measures(score: Score) -> tuple[Measure, ...]:
    """The measures whose paired differences are shown."""
    return (*score_measures(score), MEMORISED, CORRECTED)
