"""What filtering costs: the same step under plain accumulation, averaging and GAF, alternating in one process.

Machines are noisy, so every figure is a ratio to the plain step of the same round, with its spread. Memory is counted
from the allocator's own events, not sampled: the peak of a fresh model's first two steps.
"""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import gaf
from gaf_lab.progress import Tell, silent
from gaf_lab.records import environment
from gaf_lab.records import run as records
from gaf_lab.settings.fields import ModelName
from gaf_lab.training import models

MICRO_BATCHES = tuple[Tensor, Tensor]
Step = Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """One way of stepping: milliseconds a step, those of plain, ratios by rounds, peak bytes, and the peak beyond plain's in gradients."""

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
            "kind": "bench-accumulate", "way": self.name, "k": self.k, "rounds": len(self.ratios),
            "ms_median": statistics.median(self.milliseconds), "plain_ms_median": statistics.median(self.plain_milliseconds),
            "ratio_median": statistics.median(self.ratios), "ratio_p10": low, "ratio_p90": high,
            "peak_mib": self.peak_bytes / 2**20, "extra_gradients": self.extra_gradients,
        }  # fmt: skip


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: MICRO_BATCHES, k: int
) -> None:
    for _ in range(k):
        (nn.functional.cross_entropy(model(batch[0]), batch[1]) / k).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulator_step(
    model: nn.Module, accumulator: gaf.Accumulator, batch: MICRO_BATCHES, k: int
) -> None:
    for _ in range(k):
        accumulator.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
    accumulator.step()


FRESH = 5  # rounds with the same models

PLAIN = "plain accumulation"
WAYS: dict[str, Any] = {
    "gaf.Mean()": gaf.Mean,
    "gaf.GAF()": lambda: gaf.GAF(2.0),  # accepts every row: the most work
    "gaf.GAF(start='best')": lambda: gaf.GAF(2.0, start="best"),
}


def make_step(way: str, k: int, b: int, name: ModelName, stem: models.Stem) -> tuple[Step, int]:
    """A step of a fresh model, and the bytes of one gradient."""
    torch.manual_seed(0)
    model = models.build(name, (3, 32, 32), 100, stem)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    batch = torch.randn(b, 3, 32, 32), torch.randint(0, 100, (b,))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if way == PLAIN:
        return lambda: plain_step(model, optimizer, batch, k), size
    accumulator = gaf.Accumulator(optimizer, WAYS[way]())
    return lambda: accumulator_step(model, accumulator, batch, k), size


def peak_bytes(make: Callable[[], Step]) -> int:
    """The most memory held by tensors at once while a model is made and two steps are taken."""
    with (
        silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        step = make()
        step()
        step()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's own library writes a line there each time that it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def accumulate(
    name: ModelName = "resnet18",
    stem: models.Stem = "imagenet",
    b: int = 100,
    ks: tuple[int, ...] = (2, 4),
    rounds: int = 30,
    tell: Tell = silent,
) -> list[Measured]:
    """Measures every way at every k against plain accumulation, a step of each in turn, `rounds` times. tell: how far it is."""
    found = []
    for k in ks:
        plain_peak = peak_bytes(lambda k=k: make_step(PLAIN, k, b, name, stem)[0])  # type: ignore[misc]
        for way in WAYS:
            times: list[tuple[float, float]] = []
            # fresh models now and then: where they lie in memory moves times by some percent
            while len(times) < rounds:
                tell(f"k = {k}, {way}", len(times), rounds)
                (plain, size), (step, _) = (
                    make_step(PLAIN, k, b, name, stem),
                    make_step(way, k, b, name, stem),
                )
                times += alternate(plain, step, min(FRESH, rounds - len(times)))
            peak = peak_bytes(lambda k=k, way=way: make_step(way, k, b, name, stem)[0])  # type: ignore[misc]
            ratios = [ours / theirs for theirs, ours in times]
            found.append(
                Measured(
                    way,
                    k,
                    [t for _, t in times],
                    [t for t, _ in times],
                    ratios,
                    peak,
                    (peak - plain_peak) / size,
                )
            )
    return found


def alternate(first: Step, second: Step, rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of both in each round, the one that begins changing from round to round; the first round is not counted."""
    times = []
    for number in range(rounds + 1):
        seconds = {}
        for step in (first, second) if number % 2 else (second, first):
            started = time.perf_counter()
            step()
            seconds[step] = time.perf_counter() - started
        times.append((1000 * seconds[first], 1000 * seconds[second]))
    return times[1:]


def table(found: list[Measured]) -> Table:
    result = Table(title="A step against plain accumulation in the same round", box=box.SIMPLE_HEAD)
    for column in ("k", "way", "ms", "plain", "ratio", "10-90%", "MiB", "gradients"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in (m.line() for m in found):
        times = (
            f"{line['ms_median']:.0f}",
            f"{line['plain_ms_median']:.0f}",
            f"{line['ratio_median']:.3f}",
        )
        spread = f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}"
        result.add_row(
            str(line["k"]),
            line["way"],
            *times,
            spread,
            f"{line['peak_mib']:.0f}",
            f"{line['extra_gradients']:+.2f}",
        )
    result.caption = "medians; MiB at the peak; gradients held beyond plain accumulation"
    return result


class Line(Protocol):
    """What has a line in a file of figures."""

    def line(self) -> dict[str, Any]: ...


def write(
    found: Sequence[Line],
    path: Path,
    conditions: dict[str, Any],
    device: torch.device | None = None,
) -> None:
    """JSON lines: conditions first, then a line for each thing measured. device: where, if not on the CPU.

    load: processes that wanted the CPU in the last minute, ours among them; above the number of cores, times on the clock are blurred.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = environment.machine(device or torch.device("cpu"))
    where = {
        "versions": environment.versions(),
        "machine": machine,
        "load": os.getloadavg()[0],
        "commit": environment.commit(),
    }
    lines = [{"kind": "conditions", **conditions, **where}, *(m.line() for m in found)]
    with records.whole(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
