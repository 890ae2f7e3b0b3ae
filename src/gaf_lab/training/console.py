"""What a person sees while a command runs: bars on a terminal, elsewhere plain lines.

Elsewhere: in a pipe, a log file or a CI; see `gaf_lab.progress`.
"""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

import gaf
from gaf_lab.data.run_data import RunData
from gaf_lab.progress import Pulse, format_duration
from gaf_lab.records.score import ACCURACY
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.task_source import name_task


def make_bars(console: Console) -> Bars:
    """Bars that fit 80 columns: a name, the share done, some facts, the time left.

    Without a terminal they show nothing.
    """
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    left = TextColumn("eta"), TimeLeftColumn(compact=True)
    return Bars(*columns, *left, console=console, disable=not console.is_terminal)


class TimeLeftColumn(TimeRemainingColumn):
    """The task's own `left`, in seconds, if it has this field; else the bar's estimate."""

    def render(self, task: Task) -> Text:
        if "left" not in task.fields:
            return super().render(task)
        left = task.fields["left"]
        text = "--:--" if left is None else format_duration(left)
        return Text(text, style="progress.remaining")


class Progress:
    """The progress of a command that shows no runs.

    A line that changes on a terminal; elsewhere a line for each new part, and one every EVERY
    seconds. A call gives the name of the part, the number of units done, and their total.

    unit: the name of what is counted.
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
        """The time that the part will still take, once it has run for a second."""
        gone, steps = time.monotonic() - self.begun, done - self.first
        if gone < 1 or steps <= 0:
            return ""
        return f", eta {format_duration(gone / steps * (total - done))}"


def share_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def number_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def label_noise(config: TrainConfig) -> str:
    """The training labels' fault: "40% symmetric label noise", "human labels"; "" if clean."""
    if config.noise == "human":
        return "human labels"
    if config.noise == "none" or not config.noise_rate:
        return ""
    return f"{100 * config.noise_rate:g}% {config.noise} label noise"


def describe_data(config: TrainConfig) -> str:
    """The data set or task, and its label noise."""
    name = name_task(config.task) if config.task else config.dataset
    return ", ".join(filter(None, (name, label_noise(config))))


def describe_training(config: TrainConfig) -> str:
    """The model, unless a task brings it; the arm, k and b."""
    model = "" if config.task else f"{config.model}; "
    return f"{model}{config.arm}, k = {config.k}, b = {config.b}"


COLUMNS = {  # titles and widths, 78 in all
    "pass": 7,
    "step": 8,
    "loss": 7,
    "held-out": 10,
    "test": 7,
    "memorised": 11,
    "accepted": 9,
    "distance": 9,
    "samples/s": 10,
}


def table_line(cells: Iterable[str]) -> str:
    padded = zip(cells, COLUMNS.values(), strict=True)
    return "".join(f" {cell}".rjust(width) for cell, width in padded)  # apart, even if too wide


class ConsoleListener:
    """A progress bar over steps, and a line per evaluation.

    Without a terminal there is no bar; a line reports the progress if an evaluation takes long.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.bar = console, make_bars(console)
        self.score = ACCURACY  # until a run begins
        self.pulse = Pulse(console, self._how_far)

    def begin(self, problem: RunData, step: int, steps: int) -> None:
        c, self.score = problem.config, problem.score
        begin = f", from step {step:,}" if step else ""
        self.console.print(
            f"{describe_data(c)}: {len(problem.train):,} training samples, "
            f"{len(problem.heldout):,} held out, {len(problem.test):,} for test; "
            f"{describe_training(c)}; {steps:,} step{'' if steps == 1 else 's'}{begin}"
        )
        self.console.print(table_line(COLUMNS), style="bold")
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
            number_or_dash(line["train_loss"]),
            self.score.text(self.score.of(line, "heldout")),
            self.score.text(self.score.of(line)),
            share_or_dash(line["memorised"]),
            share_or_dash(line["acceptance"]),
            number_or_dash(line["distance_mean"]),
            f"{line['samples_per_second'] or 0:,.0f}",
        )
        self.bar.console.print(table_line(cells), highlight=False)

    def close(self) -> None:
        self.pulse.stop()
        self.bar.stop()
