"""What a person sees while a run goes on."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import gaf
from gaf_lab.config import TrainConfig, label_noise
from gaf_lab.problem import Problem
from gaf_lab.train import Listener


def progress(console: Console) -> Progress:
    """Bars that fit 80 columns: what, how far, some facts, time left."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    return Progress(*columns, TextColumn("eta"), TimeRemainingColumn(compact=True), console=console)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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
    """A progress bar over steps, and a line per evaluation."""

    def __init__(self, console: Console) -> None:
        self.console, self.bar = console, progress(console)

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

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        facts = f"step {step:,}, accepted {sum(outcome.accepted)} of {len(outcome.accepted)}"
        self.bar.update(self.task, completed=step, facts=facts)

    def evaluated(self, line: dict[str, Any]) -> None:
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
