"""What a person sees while a command goes on: bars on a terminal; in a pipe, a log file or a CI plain lines (`gaf_lab.progress`)."""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

import gaf
from gaf_lab.data.problem import Problem
from gaf_lab.progress import Pulse, format_duration
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.run import Listener


def progress(console: Console) -> Bars:
    """Bars that fit 80 columns: what, how far, some facts, time left. Nothing where there is no terminal."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    left = TextColumn("eta"), TimeRemainingColumn(compact=True)
    return Bars(*columns, *left, console=console, disable=not console.is_terminal)


class Progress:
    """How far a command is that shows no runs: a line that changes on a terminal; else one for each new part, and one every EVERY seconds.

    It is called with what is being done, its number, and how many there are. unit: what is counted.
    """

    def __init__(self, console: Console, unit: str = "step") -> None:
        self.console, self.unit, self.now = console, unit, ("", 0, 0)
        self.pulse, self.status = Pulse(console, self._text), console.status("")

    def __enter__(self) -> "Progress":
        self.pulse.start()
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.pulse.stop()
        self.status.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        new = what != self.now[0]
        self.now = what, done, total
        if new:
            self.begun, self.first = time.monotonic(), done
        if self.console.is_terminal:
            self.status.update(escape(self._text()))
        elif new and not self.console.quiet:
            self.pulse.say()

    def _text(self) -> str:
        what, done, total = self.now
        if not what:
            return ""
        return f"{what}: {self.unit} {done:,} of {total:,}{self._left(done, total)}"

    def _left(self, done: int, total: int) -> str:
        """How long the part will still take, once it has gone on for a second."""
        gone, steps = time.monotonic() - self.begun, done - self.first
        if gone < 1 or steps <= 0:
            return ""
        return f", eta {format_duration(gone / steps * (total - done))}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def label_noise(config: TrainConfig) -> str:
    """The fault of the training labels: "40% symmetric label noise", "human labels"; "" if clean."""
    if config.noise == "human":
        return "human labels"
    if config.noise == "none" or not config.noise_rate:
        return ""
    return f"{100 * config.noise_rate:g}% {config.noise} label noise"


def labelled(config: TrainConfig) -> str:
    """The data set, and what is wrong with its labels."""
    return ", ".join(filter(None, (config.dataset, label_noise(config))))


def trained(config: TrainConfig) -> str:
    return f"{config.model}; {config.arm}, k = {config.k}, b = {config.b}"


TITLES = (
    "pass",
    "step",
    "loss",
    "held-out",
    "test",
    "memorised",
    "accepted",
    "distance",
    "samples/s",
)
WIDTHS = (7, 8, 7, 10, 7, 11, 9, 9, 10)  # 78 in all


class ConsoleListener:
    """A progress bar over steps, and a line per evaluation; without a terminal, a line for those that are long in coming."""

    def __init__(self, console: Console) -> None:
        self.console, self.bar = console, progress(console)
        self.pulse = Pulse(console, self._how_far)

    def begin(self, problem: Problem, step: int, steps: int) -> None:
        c = problem.config
        self.console.print(
            f"{labelled(c)}: {len(problem.train):,} training pictures, {len(problem.heldout):,} held out, {len(problem.test):,} for test; "
            f"{trained(c)}; {steps:,} steps" + (f", from step {step:,}" if step else "")
        )
        self.console.print(
            "".join(title.rjust(width) for title, width in zip(TITLES, WIDTHS, strict=True)),
            style="bold",
        )
        self.bar.start()
        self.task = self.bar.add_task("training", total=steps, completed=step, facts="")
        self.pulse.start()

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        facts = f"step {step:,}, accepted {sum(outcome.accepted)} of {len(outcome.accepted)}"
        self.bar.update(self.task, completed=step, facts=facts)

    def _how_far(self) -> str:
        task = self.bar.tasks[self.task]
        eta = "" if task.time_remaining is None else f", eta {format_duration(task.time_remaining)}"
        return f"training: step {task.completed:,.0f} of {task.total:,.0f}{eta}"

    def evaluated(self, line: dict[str, Any]) -> None:
        self.pulse.rest()
        cells = (
            f"{line['passes']:.2f}",
            f"{line['step']:,}",
            number(line["train_loss"]),
            *(
                percent(line[key])
                for key in ("heldout_accuracy", "test_accuracy", "memorised", "acceptance")
            ),
            number(line["distance_mean"]),
            f"{line['samples_per_second'] or 0:,.0f}",
        )
        self.bar.console.print(
            "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True)),
            highlight=False,
        )

    def close(self) -> None:
        self.pulse.stop()
        self.bar.stop()


class Listeners:
    """Several as one."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def begin(self, problem: Problem, step: int, steps: int) -> None:
        for each in self.listeners:
            each.begin(problem, step, steps)

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        for each in self.listeners:
            each.stepped(step, outcome)

    def evaluated(self, line: dict[str, Any]) -> None:
        for each in self.listeners:
            each.evaluated(line)
