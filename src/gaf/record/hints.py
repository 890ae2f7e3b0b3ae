"""Warnings about a run that goes wrong: no row agrees, every row agrees, or all are absent."""

import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from gaf.record.outcome import Outcome
from gaf.record.recent import WINDOW, Recent, finite_sum
from gaf.rules.contract import argument_of_least, given_tau, min_accepted_of

ONE_ROW = "One micro-gradient has nothing to agree with: it was stepped on as in plain training."
ALL_ABSENT = (
    f"Every micro-gradient was zero, NaN or infinite in {WINDOW} steps, and nothing moved: "
    "has the loss become NaN, or does it not depend on the parameters?"
)
NO_TRANSFER = "tau does not transfer between tasks; acc.stats() shows the distances."


class Hints:
    """Warns of a run that goes wrong, once for each reason.

    Attributes:
        steps_without_acceptance: steps in a row without an accepted row among those compared.
        steps_all_accepted: steps in a row that accepted all compared rows.
        warned: reasons that were warned of.
    """

    def __init__(self) -> None:
        self.steps_without_acceptance = self.steps_all_accepted = 0
        self.warned: set[str] = set()

    def look(self, outcome: Outcome, recent: Iterable[Recent], policy: Any) -> None:
        """After each step. recent: the last steps, this one at the end."""
        steps = list(recent)
        if len(outcome.accepted) == 1 and outcome.stepped:
            self._warn_once("one", ONE_ROW)
        if len(steps) == WINDOW and all(math.isnan(step.dispersion) for step in steps):
            self._warn_once("absent", ALL_ABSENT)
        if not steps[-1].compared:
            return
        self._count(steps[-1])
        if self.steps_without_acceptance >= WINDOW:
            self._warn_once("none", explain_none_accepted(policy, outcome, seen_in(steps)))
        tau = given_tau(policy) if isinstance(given_tau(policy), Real) else 2
        if self.steps_all_accepted >= WINDOW and tau < 2:
            self._warn_once("all", explain_all_accepted(tau, seen_in(steps)))

    def _count(self, step: Recent) -> None:
        self.steps_without_acceptance += 1
        self.steps_all_accepted += 1
        if step.accepted:
            self.steps_without_acceptance = 0
        if step.accepted != step.compared:
            self.steps_all_accepted = 0

    def _warn_once(self, reason: str, message: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"gaf: {message}", stacklevel=frames_inside() + 1)


def seen_in(steps: Iterable[Recent]) -> list[Recent]:
    """The steps in which rows were compared."""
    return [step for step in steps if step.compared]


def explain_none_accepted(policy: Any, outcome: Outcome, seen: list[Recent]) -> str:
    """Why nothing is accepted, and what to do."""
    start = f"No micro-gradient was accepted in {WINDOW} steps:"
    least, k = min(step.distance_min for step in seen), len(outcome.accepted)
    if least <= outcome.tau and min_accepted_of(policy) > 2:
        return (
            f"{start} min_accepted = {min_accepted_of(policy)} of {k} is more than ever agreed. "
            f"Lower {argument_of_least(policy)}; acc.stats() shows the distances."
        )
    tau = given_tau(policy)
    if isinstance(tau, Real):
        misfit, change = f"tau = {tau} does not fit", "raise tau above that"
    else:
        misfit = f"{policy if tau is None else tau} came to {outcome.tau:.3f} and does not fit"
        change = "choose one that accepts more"
    return (
        f"{start} {misfit} this task. The smallest distance seen was {least:.3f}: {change}, "
        f"or use larger micro-batches. {NO_TRANSFER}"
    )


def explain_all_accepted(tau: float, seen: list[Recent]) -> str:
    total = finite_sum(step.distance_sum for step in seen)
    mean = total / finite_sum(step.compared for step in seen)
    return (
        f"Every micro-gradient was accepted in {WINDOW} steps: tau = {tau} filters nothing here. "
        f"The mean distance was {mean:.3f}: lower tau to about that, or use smaller micro-batches. "
        f"{NO_TRANSFER}"
    )


def frames_inside() -> int:
    """Calls between here and the first line outside this package and torch.

    That line is the user's, which a warning is to name.
    """
    here = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, count = frame.f_back, count + 1
    return count - 1
