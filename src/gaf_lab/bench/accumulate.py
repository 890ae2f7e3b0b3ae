"""What filtering costs on one device: a step under plain accumulation, averaging and GAF, in turn.

Machines are noisy, so every figure is a ratio to the plain step of the same round, with its spread,
on the clock and in CPU time. Memory is counted from the allocator's own events, not sampled: the
peak of a fresh model's first two steps.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table

from gaf_lab.bench.accumulation_steps import (
    PLAIN_ACCUMULATION,
    POLICIES,
    AccumulationSize,
    make_accumulation_step,
)
from gaf_lab.bench.memory import tensor_peak
from gaf_lab.bench.timing import (
    StepFunction,
    StepsFunction,
    StepTime,
    compare_steps,
    time_in_turn,
)
from gaf_lab.progress import Tell, silent

PAIR_ROUNDS = 5  # rounds with the same two models
TURN = 0.05  # seconds between two looks at the clock, at least a step


@dataclass(frozen=True)
class AccumulationCost:
    """One way of stepping.

    Times of its steps and of the plain ones of the same rounds, the peak in bytes, and how far the
    peak exceeds that of plain accumulation, in gradients.
    """

    size: AccumulationSize
    name: str
    k: int
    times: list[StepTime]
    plain: list[StepTime]
    peak_bytes: int
    extra_gradients: float

    def line(self) -> dict[str, Any]:
        return {
            "kind": "bench-accumulate",
            **self.size.columns(),
            "way": self.name,
            "k": self.k,
            "rounds": len(self.times),
            "plain_ms_median": median(one.wall for one in self.plain),
            **compare_steps("ratio", self.times, self.plain),
            "peak_mib": self.peak_bytes / 2**20,
            "extra_gradients": self.extra_gradients,
        }


def measure_accumulation(
    sizes: Sequence[AccumulationSize],
    ks: Sequence[int] = (2, 4),
    rounds: int = 30,
    tell: Tell = silent,
) -> list[AccumulationCost]:
    """Measures every policy at every size and k against plain accumulation, both in every round.

    Args:
        sizes: models and micro-batches.
        ks: numbers of micro-batches.
        rounds: how many.
        tell: is called with the progress.
    """
    found = []
    for size, k in itertools.product(sizes, ks):
        make_plain = partial(make_accumulation_step, PLAIN_ACCUMULATION, size, k)
        plain_peak = tensor_peak(make_plain)
        for way in POLICIES:
            make = partial(make_accumulation_step, way, size, k)
            plain, ours = time_pairs(make_plain, make, rounds, partial(tell, f"k = {k}, {way}"))
            peak = tensor_peak(make)
            extra = (peak - plain_peak) / size.gradient_bytes()
            found.append(AccumulationCost(size, way, k, ours, plain, peak, extra))
    return found


def time_pairs(
    make_plain: Callable[[], StepFunction],
    make: Callable[[], StepFunction],
    rounds: int,
    tell: Callable[[int, int], None],
) -> tuple[list[StepTime], list[StepTime]]:
    """Times of both in each round.

    The models are made anew now and then: their places in memory move times by some percent.
    """
    plain: list[StepTime] = []
    ours: list[StepTime] = []
    while len(ours) < rounds:
        tell(len(ours), rounds)
        work = {"plain": repeated(make_plain()), "ours": repeated(make())}
        few = min(PAIR_ROUNDS, rounds - len(ours))
        times = time_in_turn(work, few, steps_of_a_turn(make_plain()), torch.device("cpu"))
        plain, ours = plain + times["plain"], ours + times["ours"]
    return plain, ours


def repeated(step: StepFunction) -> StepsFunction:
    def steps(count: int) -> None:
        for _ in range(count):
            step()

    return steps


def steps_of_a_turn(step: StepFunction) -> int:
    """How many such steps take about 50 ms: looks at the clock cost nothing beside them."""
    step()
    started = time.perf_counter()
    step()
    return max(1, round(TURN / (time.perf_counter() - started)))


def table(found: list[AccumulationCost]) -> Table:
    title = "A step against plain accumulation in the same round"
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    lines = [cost.line() for cost in found]
    sizes = list(found[0].size.columns())
    columns = ("k", *sizes, "way", "ms", "plain", "ratio", "10-90%", "CPU", "extra")
    for column in columns:
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in lines:
        result.add_row(
            *(str(line[column]) for column in ("k", *sizes)),
            line["way"].removeprefix("gaf."),
            f"{line['ms_median']:.3g}",
            f"{line['plain_ms_median']:.3g}",
            f"{line['ratio_median']:.3f}",
            f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
            f"{line['cpu_ratio_median']:.3f}",
            f"{line['extra_gradients']:+.2f}",
        )
    result.caption = "medians; CPU: the ratio of CPU times; extra: gradients held beyond plain"
    return result
