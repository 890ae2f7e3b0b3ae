"""Reports of progress; without a terminal as plain lines, at least every EVERY seconds."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Tell = Callable[[str, int, int], None]  # the task, the number reached, the total


def silent(what: str, number: int, of: int) -> None:
    """Reports nothing."""


EVERY = 10.0  # seconds


class Pulse:
    """Prints the progress every EVERY seconds, unless the console is a terminal.

    A thread prints, because a step, an evaluation or a download may take minutes. `how_far` is
    called in that thread; nothing is printed while it returns "".
    """

    def __init__(self, console: "Console", how_far: Callable[[], str]) -> None:
        self.console, self.how_far = console, how_far
        self.started = self.said = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Starts the thread, once."""
        if not (self.console.is_terminal or self.console.quiet or self.thread.ident):
            self.thread.start()

    def stop(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def rest(self) -> None:
        """Waits EVERY seconds again, because another line was printed just now."""
        self.said = time.monotonic()

    def say(self) -> None:
        self.rest()
        if text := self.how_far():
            print_line(
                self.console, f"{text}, {format_duration(time.monotonic() - self.started)} so far"
            )

    def _beat(self) -> None:
        while not self.over.wait(max(0.01, self.said + EVERY - time.monotonic())):
            if time.monotonic() - self.said >= EVERY:
                self.say()


def print_line(console: "Console", text: str) -> None:
    """Prints a line unchanged, not wrapped at the width of a terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def format_duration(seconds: float) -> str:
    """1:02:03; 0:00:04."""
    return str(timedelta(seconds=round(seconds)))
