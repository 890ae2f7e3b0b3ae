"""Runs that give way to one another in one thread."""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Turns = Generator[None, None, Result]  # gives way to others at each yield


def run_to_end(turns: Turns[Result]) -> Result:
    """Runs a generator of turns to its end and returns its result."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
