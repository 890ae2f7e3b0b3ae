"""How far something is, told to whoever listens; in a pipe, a log file or a CI as plain lines, at least every EVERY seconds."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Tell = Callable[[str, int, int], None]  # what is being done, its number, and how many there are


def silent(what: str, number: int, of: int) -> None:
    """Tells nobody."""


EVERY = 10.0  # seconds


class Pulse:
    """Where there is no terminal, says every EVERY seconds how far something is; silent while that is empty.

    A thread does so, for a step, an evaluation or a download may take minutes. how_far: called in that thread.
    """

    def __init__(self, console: "Console", how_far: Callable[[], str]) -> None:
        self.console, self.how_far = console, how_far
        self.started = self.said = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Begins, once."""
        if not (self.console.is_terminal or self.console.quiet or self.thread.ident):
            self.thread.start()

    def stop(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def rest(self) -> None:
        """Something else was said just now."""
        self.said = time.monotonic()

    def say(self) -> None:
        self.rest()
        if text := self.how_far():
            line(self.console, f"{text}, {format_duration(time.monotonic() - self.started)} so far")

    def _beat(self) -> None:
        while not self.over.wait(max(0.01, self.said + EVERY - time.monotonic())):
            if time.monotonic() - self.said >= EVERY:
                self.say()


def line(console: "Console", text: str) -> None:
    """A line as it is, not broken at the width of a terminal that is none."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def format_duration(seconds: float) -> str:
    """1:02:03; 0:00:04."""
    return str(timedelta(seconds=round(seconds)))
