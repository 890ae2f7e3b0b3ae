"""What a person sees while a run goes on."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import gaf
from gaf_lab.problem import Problem
from gaf_lab.train import Listener


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=console)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


class ConsoleListener:
    """A progress bar over steps, and a line per evaluation."""

    def __init__(self, console: Console) -> None:
        self.console, self.bar = console, progress(console)

    def begin(self, problem: Problem, step: int, steps: int) -> None:
        c = problem.config
        self.console.print(
            f"{c.dataset}: {len(problem.train):,} training pictures, {len(problem.heldout):,} held out, {len(problem.test):,} for test; "
            f"{c.model}; {c.arm}, k = {c.k}, b = {c.b}; {steps:,} steps" + (f", from step {step:,}" if step else "")
        )
        self.bar.start()
        self.task = self.bar.add_task("training", total=steps, completed=step, facts="")

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        facts = f"accepted {sum(outcome.accepted)} of {len(outcome.accepted)}"
        self.bar.update(self.task, completed=step, facts=facts)

    def evaluated(self, line: dict[str, Any]) -> None:
        self.bar.console.print(
            f"pass {line['passes']:7.2f}  step {line['step']:>7,}  loss {number(line['train_loss'])}  "
            f"held-out {percent(line['heldout_accuracy'])}  test {percent(line['test_accuracy'])}  memorised {percent(line['memorised'])}  "
            f"accepted {percent(line['acceptance'])}  distance {number(line['distance_mean'])}  "
            f"{line['samples_per_second'] or 0:,.0f} samples/s",
            highlight=False,
        )

    def close(self) -> None:
        self.bar.stop()


class TensorBoardListener:
    """Every number of an evaluation line as a scalar over samples seen."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def begin(self, problem: Problem, step: int, steps: int) -> None:
        self.writer.add_text("config", str(problem.config.plain()))

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        pass

    def evaluated(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if isinstance(value, int | float) and value == value and key != "samples":
                self.writer.add_scalar(key, value, line["samples"])

    def close(self) -> None:
        self.writer.close()


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
