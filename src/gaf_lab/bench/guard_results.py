"""What `gaf bench guard` found, as lines and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class FaultFound:
    """One fault at one worker of k, over the seeds.

    Attributes:
        delays: steps from the fault to the first alarm of its worker, the first step is 1; None for
            no alarm.
        kinds: of that alarm.
        wrong: alarms of other workers, and before the fault, in all seeds.
        loss, accuracy: on the test set at the end, by the way of stepping; None if not finite.
    """

    task: str
    k: int
    fault: str
    delays: list[int | None]
    kinds: list[str | None]
    wrong: int
    loss: dict[str, list[float | None]]
    accuracy: dict[str, list[float]]

    def line(self) -> dict[str, Any]:
        return {"kind": "bench-guard", **vars(self)}


@dataclass(frozen=True)
class FalseAlarms:
    """Alarms of runs in which nothing is wrong. steps: of all runs together."""

    task: str
    k: int
    steps: int
    alarms: list[dict[str, Any]]

    def line(self) -> dict[str, Any]:
        return {"kind": "bench-guard-clean", **vars(self)}


def detection_cell(delays: Sequence[int | None]) -> str:
    """How many runs named the worker, and after how many steps (median; the slowest)."""
    known = [delay for delay in delays if delay is not None]
    share = f"{len(known)} of {len(delays)}"
    return f"{share}: {median(known):.0f} ({max(known)})" if known else share


def mean_accuracy(shares: Sequence[float]) -> str:
    return f"{100 * math.fsum(shares) / len(shares):.1f}%"


def guard_tables(found: Sequence[FaultFound], clean: Sequence[FalseAlarms]) -> list[Table]:
    ways = list(found[0].accuracy)
    faults = Table("task", "k", "fault", "named after", "wrong", *ways, box=box.SIMPLE)
    for one in found:
        shares = (mean_accuracy(one.accuracy[way]) for way in ways)
        delays = detection_cell(one.delays)
        faults.add_row(one.task, str(one.k), one.fault, delays, str(one.wrong), *shares)
    alarms = Table("task", "k", "clean steps", "false alarms", box=box.SIMPLE)
    for each in clean:
        alarms.add_row(each.task, str(each.k), str(each.steps), str(len(each.alarms)))
    return [faults, alarms]
