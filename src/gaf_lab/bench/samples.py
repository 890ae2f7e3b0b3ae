"""What K of single samples costs: `gaf.ghost_gram` and others, in turn, with the forward pass.

The ratio is of CPU time, to that of a plain forward and backward pass of the same round. The
peak is of what tensors hold at once, without the model. A way that would not fit into the memory
that is free is left out; how much per-sample gradients take is known beforehand.
"""

import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from gaf_lab.bench.memory import tensor_peak
from gaf_lab.bench.samples_models import sample_problem
from gaf_lab.bench.samples_ways import PER_SAMPLE, PLAIN_BACKWARD, TORCHJD, ways_to_gram
from gaf_lab.bench.timing import StepTime, now, rotate
from gaf_lab.progress import Tell, silent

NEEDS = {PER_SAMPLE: 1.3, TORCHJD: 0.8}  # memory, as a multiple of all per-sample gradients
SLOW = 5.0  # seconds of a pass
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SampleCost:
    """One way to K. times: of each round, and of the plain passes; peak: bytes."""

    model: str
    n: int
    way: str
    times: list[StepTime]
    plain_times: list[StepTime]
    peak: int
    gradient: int  # bytes of one gradient

    @property
    def fastest(self) -> float:
        """Seconds of the fastest pass."""
        return min(time.wall for time in self.times) / 1000

    def line(self) -> dict[str, Any]:
        ratios = [a.cpu / b.cpu for a, b in zip(self.times, self.plain_times, strict=True)]
        return {
            "kind": "bench-samples",
            "model": self.model,
            "n": self.n,
            "way": self.way,
            "rounds": len(ratios),
            "ms_median": statistics.median(time.wall for time in self.times),
            "cpu_ms_median": statistics.median(time.cpu for time in self.times),
            "cpu_ratio_median": statistics.median(ratios),
            "cpu_ratio_min": min(ratios),
            "cpu_ratio_max": max(ratios),
            "peak_mib": self.peak / 2**20,
            "per_sample_gradients_mib": self.n * self.gradient / 2**20,
        }


def measure_samples(
    names: tuple[str, ...] = ("resnet18", "transformer"),
    ns: tuple[int, ...] = (32, 64, 128, 256),
    rounds: int = 3,
    longest: float = 20.0,
    tell: Tell = silent,
) -> list[SampleCost]:
    """Measures every way on every network at every n.

    Args:
        names: of networks, as `sample_problem` has them.
        ns: samples in a batch.
        rounds: how many, after one that is not counted. A pass of more than `SLOW` seconds is not
            repeated.
        longest: seconds; a way that took more is left out at the larger n that follow.
        tell: is called with the progress.
    """
    found: list[SampleCost] = []
    for name in names:
        slow: set[str] = set()
        for n in sorted(ns):
            tell(f"{name}, n = {n}", len(found), 4 * len(names) * len(ns))
            costs = measure_batch(name, n, rounds, slow)
            slow |= {cost.way for cost in costs if cost.fastest > longest} - {PLAIN_BACKWARD}
            found += costs
    return found


def measure_batch(name: str, n: int, rounds: int, slow: Collection[str]) -> list[SampleCost]:
    """All ways but the slow ones, and those that may need more than half of the free memory."""
    model, x, y = sample_problem(name, n)
    gradient = sum(p.numel() * p.element_size() for p in model.parameters())
    works = {
        way: partial(work, model, x, y)
        for way, work in ways_to_gram(model).items()
        if way not in slow and NEEDS.get(way, 0) * n * gradient < free_memory() / 2
    }
    times = time_works(works, rounds)
    peaks = {way: peak_of(work) for way, work in works.items()}
    plain = times[PLAIN_BACKWARD]
    return [
        SampleCost(name, n, way, took, plain[-len(took) :], peaks[way], gradient)
        for way, took in times.items()
    ]


def time_works(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[StepTime]]:
    """The time of each round but the first; of the first alone, if it is slow."""
    times: dict[str, list[StepTime]] = {way: [] for way in works}
    for number in range(rounds + 1):
        for way in rotate(list(works), number):
            if number and times[way][0].wall > 1000 * SLOW:
                continue
            wall, cpu = now(CPU)
            works[way]()
            later = now(CPU)
            times[way].append(StepTime(1000 * (later[0] - wall), 1000 * (later[1] - cpu)))
    return {way: took[1:] or took for way, took in times.items()}


def peak_of(work: Callable[[], object]) -> int:
    def step() -> None:
        work()

    return tensor_peak(lambda: step)


def free_memory() -> float:
    """Bytes; infinite where it is not known."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    sizes = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return sizes[0] if sizes else float("inf")


def sample_table(found: list[SampleCost]) -> Table:
    result = Table(title="K of n samples, with the forward pass", box=box.SIMPLE_HEAD)
    for column in ("model", "n", "way", "ms", "CPU ms", "ratio", "MiB"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in (cost.line() for cost in found):
        result.add_row(
            line["model"],
            str(line["n"]),
            line["way"],
            f"{line['ms_median']:.0f}",
            f"{line['cpu_ms_median']:.0f}",
            f"{line['cpu_ratio_median']:.2f}",
            f"{line['peak_mib']:.0f}",
        )
    result.caption = "medians; ratio of CPU times to a forward and backward pass; MiB at the peak"
    return result
