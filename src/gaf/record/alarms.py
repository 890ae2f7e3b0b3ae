"""Alarms: what a policy found wrong, kept as plain numbers under the worker's name."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gaf.record.hints import frames_inside
from gaf.rules.finding import Finding

EPISODE = 100  # steps within which the same finding belongs to the same alarm

# the text of a warning, by the kind of finding about a row or about the step
TEXTS = {
    "not finite": "its gradient is not finite",
    "norm": "its gradient's norm is {value:.3g} where {expected:.3g} is usual",
    "cosine": "its gradient's cosine to the others is {value:.2f} where {expected:.2f} is usual",
    "norm drift": "norm {value:.3g} against {expected:.3g} for the last {steps} steps",
    "cosine drift": "cosine {value:.2f} against {expected:.2f} for the last {steps} steps",
    "step norm": "the average's norm is {value:.3g} where {expected:.3g} is usual",
}
BROKEN = ("not finite", "norm", "cosine")  # kinds of a row that is left out


@dataclass(frozen=True)
class Worker:
    """What sends a row.

    Attributes:
        rank: its global rank, or the lowest of its ranks.
        host: the name of its machine.
        ranks: all of them, if a row is of several.
    """

    rank: int
    host: str
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        name = f"rank {self.rank}"
        if len(self.ranks) > 1:
            name = f"ranks {', '.join(map(str, self.ranks))}"
        return f"{name} (host {self.host})"

    def names(self) -> dict[str, Any]:
        """Rank and host; `ranks` too, if there are several."""
        several = {"ranks": list(self.ranks)} if len(self.ranks) > 1 else {}
        return {"rank": self.rank, "host": self.host} | several


class Alarms:
    """The book of alarms of a run.

    A finding of the same worker and kind within 100 steps of the last one belongs to the same
    alarm. There is a warning for the first alarm of each worker and kind.

    Args:
        workers: who sent the rows, in their order; None where rows are micro-batches in time.

    Attributes:
        alarms: a dict for each, in order; see `gaf.Accumulator.alarms`.
    """

    def __init__(self, workers: Sequence[Worker] | None = None) -> None:
        self.workers = workers
        self.alarms: list[dict[str, Any]] = []
        self._latest: dict[tuple[int | None, str], dict[str, Any]] = {}

    def note(
        self,
        findings: Sequence[Finding],
        step: int,
        stepped: bool = True,
        on_alarm: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Adds what was found in one step.

        Args:
            findings: of the policy.
            step: its number.
            stepped: whether the step was taken.
            on_alarm: called with a copy of each alarm that is new.
        """
        for finding in findings:
            key = (finding.row, finding.kind)
            latest = self._latest.get(key)
            if latest is not None and step - latest["last_step"] <= EPISODE:
                latest["count"] += 1
                latest["last_step"] = step
                continue
            alarm = self._latest[key] = self._describe(finding, step)
            self.alarms.append(alarm)
            if latest is None:
                message = f"gaf: {self._explain(finding, step, stepped)}"
                warnings.warn(message, stacklevel=frames_inside() + 1)
            if on_alarm is not None:
                call_safely(on_alarm, dict(alarm))

    def _describe(self, finding: Finding, step: int) -> dict[str, Any]:
        return {
            "step": step,
            **self._name(finding.row),
            "kind": finding.kind,
            "value": number_or_none(finding.value),
            "expected": number_or_none(finding.expected),
            "steps": finding.steps,
            "count": 1,
            "last_step": step,
        }

    def _name(self, row: int | None) -> dict[str, Any]:
        if self.workers is None:
            return {"row": row}
        if row is None:
            return {"rank": None, "host": None}
        return self.workers[row].names()

    def _explain(self, finding: Finding, step: int, stepped: bool) -> str:
        what = TEXTS.get(finding.kind, "{kind}: {value:.3g}, expected {expected:.3g}")
        what = what.format_map(vars(finding))
        return f"{self._subject(finding.row)}{what} at step {step}.{consequence(finding, stepped)}"

    def _subject(self, row: int | None) -> str:
        if row is None:
            return ""
        name = f"row {row}" if self.workers is None else str(self.workers[row])
        return f"{name}: "


def call_safely(on_alarm: Callable[[dict[str, Any]], None], alarm: dict[str, Any]) -> None:
    """What it raises becomes a warning: on one rank alone it would leave the others waiting."""
    try:
        on_alarm(alarm)
    except Exception as error:
        warnings.warn(
            f"gaf: on_alarm must not raise; it raised {type(error).__name__}: {error}. "
            "Training goes on, and the alarm is in the list of alarms.",
            stacklevel=frames_inside() + 1,
        )


def consequence(finding: Finding, stepped: bool) -> str:
    """What was done about it, a sentence after a space."""
    if not stepped:
        return " The step was skipped."
    if finding.kind in BROKEN:
        return " It was left out of the average."
    if finding.kind == "step norm":
        return " The step was clipped."
    return " It was not left out."


def number_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
