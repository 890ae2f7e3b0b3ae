"""`gaf bench accumulate`: time and memory of a step in one process."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import check_sizes
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.checks import ConfigError, check_count
from gaf_lab.settings.choices import ModelName

MOST_MICRO_BATCHES, MOST_UNITS = 1024, 100_000


@dataclass
class BenchAccumulateOptions:
    """Time and memory of a step: plain accumulation, averaging and GAF in turn, in one process."""

    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    hidden: tuple[int, ...] = (512,)
    """Units in each hidden layer of the mlp."""
    b: tuple[int, ...] = (100,)
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
    if options.hidden != (512,) and options.model != "mlp":
        raise ConfigError(
            f"hidden is the mlp's; got it for {options.model}. Leave it out, or use --model mlp."
        )
    for hidden in options.hidden:
        check_count("hidden", hidden, 1, MOST_UNITS)
    from gaf_lab.bench.accumulate import measure_accumulation, table
    from gaf_lab.bench.accumulation_steps import AccumulationSize
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    choices = itertools.product(options.hidden, options.b)
    sizes = [AccumulationSize(options.model, options.stem, b, hidden) for hidden, b in choices]
    with Progress(console, "round") as progress:
        found = measure_accumulation(sizes, options.k, options.rounds, tell=progress)
    console.print(table(found))
    if options.out is not None:
        conditions = {
            "model": options.model,
            "stem": options.stem,
            "rounds": options.rounds,
            "pictures": "x".join(map(str, sizes[0].pictures)),
        }
        write_measurements(found, options.out, conditions)
        say(console, f"Figures: {options.out}")
    return 0
