"""What filtering costs on one device: a step under plain accumulation, averaging and GAF, in turn.

Machines are noisy, so every figure is a ratio to the plain step of the same round, with its spread.
Memory is counted from the allocator's own events, not sampled: the peak of a fresh model's first
two steps.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import gaf
from gaf_lab.bench.memory import tensor_peak
from gaf_lab.bench.timing import StepFunction
from gaf_lab.progress import Tell, silent
from gaf_lab.settings.fields import ModelName
from gaf_lab.training import models

MICRO_BATCH = tuple[Tensor, Tensor]

PAIR_ROUNDS = 5  # rounds with the same two models
PLAIN_ACCUMULATION = "plain accumulation"
POLICIES: dict[str, Any] = {
    "gaf.Mean()": gaf.Mean,
    "gaf.GAF()": lambda: gaf.GAF(2.0),  # accepts every row: the most work
    "gaf.GAF(start='best')": lambda: gaf.GAF(2.0, start="best"),
}


@dataclass(frozen=True)
class AccumulationCost:
    """One way of stepping.

    Milliseconds of its steps and of the plain ones, their ratios by rounds, the peak in bytes, and
    how far the peak exceeds that of plain accumulation, in gradients.
    """

    name: str
    k: int
    milliseconds: list[float]
    plain_milliseconds: list[float]
    ratios: list[float]
    peak_bytes: int
    extra_gradients: float

    def line(self) -> dict[str, Any]:
        low, *_, high = statistics.quantiles(self.ratios, n=10)
        return {
            "kind": "bench-accumulate",
            "way": self.name,
            "k": self.k,
            "rounds": len(self.ratios),
            "ms_median": statistics.median(self.milliseconds),
            "plain_ms_median": statistics.median(self.plain_milliseconds),
            "ratio_median": statistics.median(self.ratios),
            "ratio_p10": low,
            "ratio_p90": high,
            "peak_mib": self.peak_bytes / 2**20,
            "extra_gradients": self.extra_gradients,
        }


def measure_accumulation(
    name: ModelName = "resnet18",
    stem: models.Stem = "imagenet",
    b: int = 100,
    ks: tuple[int, ...] = (2, 4),
    rounds: int = 30,
    tell: Tell = silent,
) -> list[AccumulationCost]:
    """Measures every policy at every k against plain accumulation: a step of each in every round.

    Args:
        name: of the model.
        stem: of the model.
        b: samples of a micro-batch.
        ks: numbers of micro-batches.
        rounds: how many.
        tell: is called with the progress.
    """
    found = []
    for k in ks:
        fresh_step = partial(make_accumulation_step, k=k, b=b, name=name, stem=stem)
        make_plain = partial(fresh_step, PLAIN_ACCUMULATION)
        size = gradient_bytes(name, stem)
        plain_peak = tensor_peak(make_plain)
        for way in POLICIES:
            times: list[tuple[float, float]] = []
            # Fresh models now and then: their places in memory move times by some percent.
            while len(times) < rounds:
                tell(f"k = {k}, {way}", len(times), rounds)
                pair = make_plain(), fresh_step(way)
                times += time_pair(*pair, min(PAIR_ROUNDS, rounds - len(times)))
            peak = tensor_peak(partial(fresh_step, way))
            plain, ours = [a for a, _ in times], [b for _, b in times]
            ratios = [b / a for a, b in times]
            extra = (peak - plain_peak) / size
            found.append(AccumulationCost(way, k, ours, plain, ratios, peak, extra))
    return found


def time_pair(first: StepFunction, second: StepFunction, rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of both in each round, after one that is not counted; they take turns first."""
    times = []
    for number in range(rounds + 1):
        seconds = {}
        for step in (first, second) if number % 2 else (second, first):
            started = time.perf_counter()
            step()
            seconds[step] = time.perf_counter() - started
        times.append((1000 * seconds[first], 1000 * seconds[second]))
    return times[1:]


def make_accumulation_step(
    way: str, k: int, b: int, name: ModelName, stem: models.Stem
) -> StepFunction:
    """A step of a fresh model: plain, or by one of the policies."""
    torch.manual_seed(0)
    model = models.make_model(name, (3, 32, 32), 100, stem)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    batch = torch.randn(b, 3, 32, 32), torch.randint(0, 100, (b,))
    if way == PLAIN_ACCUMULATION:
        return partial(plain_step, model, optimizer, batch, k)
    accumulator = gaf.Accumulator(optimizer, POLICIES[way]())
    return partial(accumulator_step, model, accumulator, batch, k)


def gradient_bytes(name: ModelName, stem: models.Stem) -> int:
    model = models.make_model(name, (3, 32, 32), 100, stem)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: MICRO_BATCH, k: int
) -> None:
    for _ in range(k):
        (nn.functional.cross_entropy(model(batch[0]), batch[1]) / k).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulator_step(
    model: nn.Module, accumulator: gaf.Accumulator, batch: MICRO_BATCH, k: int
) -> None:
    for _ in range(k):
        accumulator.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
    accumulator.step()


def table(found: list[AccumulationCost]) -> Table:
    result = Table(title="A step against plain accumulation in the same round", box=box.SIMPLE_HEAD)
    for column in ("k", "way", "ms", "plain", "ratio", "10-90%", "MiB", "gradients"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in (cost.line() for cost in found):
        result.add_row(
            str(line["k"]),
            line["way"],
            f"{line['ms_median']:.0f}",
            f"{line['plain_ms_median']:.0f}",
            f"{line['ratio_median']:.3f}",
            f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
            f"{line['peak_mib']:.0f}",
            f"{line['extra_gradients']:+.2f}",
        )
    result.caption = "medians; MiB at the peak; gradients held beyond plain accumulation"
    return result
