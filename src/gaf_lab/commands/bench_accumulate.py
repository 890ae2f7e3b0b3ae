"""`gaf bench accumulate`: time and memory of a step in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import check_sizes
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.fields import ModelName

MOST_MICRO_BATCHES = 1024


@dataclass
class BenchAccumulateOptions:
    """Time and memory of a step: plain accumulation, averaging and GAF in turn, in one process."""

    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    b: int = 100
    """Samples per micro-batch."""
    k: tuple[int, ...] = (2, 4)
    """Micro-batches per step."""
    rounds: int = 30
    """Steps of each kind. Higher narrows the spread."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_accumulate(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchAccumulateOptions, prog="gaf bench accumulate", args=words)
    check_sizes(options, 1, MOST_MICRO_BATCHES)
    from gaf_lab.bench.accumulate import measure_accumulation, table
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    with Progress(console, "round") as progress:
        sizes = (options.b, options.k, options.rounds)
        found = measure_accumulation(options.model, options.stem, *sizes, tell=progress)
    console.print(table(found))
    if options.out is not None:
        conditions = {
            "model": options.model,
            "stem": options.stem,
            "b": options.b,
            "rounds": options.rounds,
            "pictures": "3x32x32",
        }
        write_measurements(found, options.out, conditions)
        say(console, f"Figures: {options.out}")
    return 0
