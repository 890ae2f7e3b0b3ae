"""What a person sees of a sweep.

In a terminal: a bar over all runs and one for each in progress. Everywhere: a line for each end.
"""

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console

from gaf_lab.progress import Pulse
from gaf_lab.records import run as records
from gaf_lab.sweeps.jobs import Job, JobProgress, accuracies
from gaf_lab.sweeps.time_left import Expected, TimeLeft, run_kind
from gaf_lab.training.console import make_bars


class Board:
    """The bars and lines of a sweep.

    Args:
        done: the runs that were finished before it, by name.
        seconds: what each run should take, by config hash; without it, the samples count.
    """

    def __init__(
        self,
        console: Console,
        plan: dict[str, Job],
        done: Mapping[str, records.Run],
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.plan, self.count, self.failures = plan, len(done), 0
        expected = {}
        for name, job in plan.items():
            cost = seconds[job.config.hash] if seconds else job.samples
            expected[name] = Expected(run_kind(job.config), cost)
        self.time = TimeLeft(expected)
        for name, run in done.items():
            self.time.finish(name, seconds_of(run))
        self.shares = dict.fromkeys(plan, 1.0)
        for name in plan.keys() - set(done):
            self.shares[name] = plan[name].recorded_progress().share
        self.bars, self.pulse = make_bars(console), Pulse(console, self._how_far)
        # Runs differ, and evaluations interrupt them: the rate over a minute is too noisy.
        self.bars.speed_estimate_period = 3600.0
        total = sum(job.samples for job in plan.values())
        self.whole = self.bars.add_task(
            "all runs", total=total, completed=int(self.samples), facts="", left=None
        )
        self.tasks = {
            name: self.bars.add_task(job.title, total=1.0, start=False, visible=False, facts="")
            for name, job in plan.items()
        }
        self.drawn = 0.0

    def __enter__(self) -> None:
        if self.count:
            self.say(f"{self.count} of {len(self.plan)} runs are finished already.")
        self.draw()
        self.bars.start()
        self.pulse.start()

    def __exit__(self, *raised: object) -> None:
        self.pulse.stop()
        self.bars.stop()

    @property
    def samples(self) -> float:
        """Samples drawn so far, of all runs."""
        return sum(self.plan[name].samples * share for name, share in self.shares.items())

    def show_started(self, name: str) -> None:
        self.time.start(name)

    def show_progress(self, name: str, now: JobProgress) -> None:
        self.time.progress(name, now.share)
        task = self.tasks[name]
        if not self.bars.tasks[task].started:
            self.bars.start_task(task)
        self.bars.update(task, completed=now.share, visible=True, facts=now.facts)
        self.shares[name] = now.share
        if time.monotonic() - self.drawn > 1:
            self.draw()

    def show_finished(self, name: str, run: records.Run) -> None:
        self.count += 1
        self.time.finish(name, seconds_of(run))
        self.shares[name] = 1.0
        self.bars.update(self.tasks[name], completed=1.0, visible=False)
        self.draw()
        self.say(
            f"{self.count} of {len(self.plan)}: {name}: {accuracies(run.evals[-1], run.score)}, "
            f"{seconds_of(run):.0f} s{self._eta()}"
        )

    def show_failed(self, name: str, why: str) -> None:
        self.failures += 1
        self.time.fail(name)
        self.bars.update(self.tasks[name], visible=False)
        self.say(f"{name} failed: {why}")

    def draw(self) -> None:
        """Draws the bar over all runs."""
        self.drawn = time.monotonic()
        facts = f"{self.count} of {len(self.plan)} finished"
        if self.failures:
            facts += f", {self.failures} failed"
        left = self.time.left()
        self.bars.update(self.whole, completed=self.samples, facts=facts, left=left)

    def say(self, text: str) -> None:
        self.pulse.rest()
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _how_far(self) -> str:
        whole = self.bars.tasks[self.whole]
        share = whole.completed / whole.total if whole.total else 0.0
        return (
            f"{self.count} of {len(self.plan)} runs finished, "
            f"{share:.0%} of all samples{self._eta()}"
        )

    def _eta(self) -> str:
        left = self.time.left()
        if left is None or self.count + self.failures == len(self.plan):
            return ""
        return f"; eta {timedelta(seconds=round(left))}"


def seconds_of(run: records.Run) -> float:
    """Seconds of a finished run, in training and evaluation."""
    assert run.end is not None
    return float(run.end["seconds"])
