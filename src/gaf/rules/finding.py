"""What a policy has noticed about a row beside its decision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OnAlarm = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a row, or with the step.

    Attributes:
        row: its index; None if it concerns the step and no single row.
        kind: what is wrong, such as "not finite".
        value: what was measured.
        expected: what is usual there.
        steps: over how many steps it was measured.
    """

    row: int | None
    kind: str
    value: float
    expected: float
    steps: int = 1


def findings_of(policy: Any) -> "list[Finding]":
    """What the policy noticed in its last decision: its attribute `findings`, if it has one."""
    return list(getattr(policy, "findings", ()))


def on_alarm_of(policy: Any) -> OnAlarm | None:
    """What the policy's user wants called with each new alarm, a dict; None for nothing."""
    return getattr(policy, "on_alarm", None)
