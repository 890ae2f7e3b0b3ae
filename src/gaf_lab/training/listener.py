"""What follows a run: the console, TensorBoard, a test."""

from typing import Any, Protocol

import gaf
from gaf_lab.data.run_data import RunData


class Listener(Protocol):
    """Receives the progress of a run."""

    def begin(self, problem: RunData, step: int, steps: int) -> None: ...
    def stepped(self, step: int, outcome: gaf.Outcome) -> None: ...
    def evaluated(self, line: dict[str, Any]) -> None: ...


class Listeners:
    """Several listeners as one."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def begin(self, problem: RunData, step: int, steps: int) -> None:
        for each in self.listeners:
            each.begin(problem, step, steps)

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        for each in self.listeners:
            each.stepped(step, outcome)

    def evaluated(self, line: dict[str, Any]) -> None:
        for each in self.listeners:
            each.evaluated(line)
