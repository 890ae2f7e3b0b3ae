"""`gaf bench samples`: time and memory of K of single samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import MOST_BATCH, check_rounds
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.checks import check_count


@dataclass
class BenchSamplesOptions:
    """Time and memory of the Gram matrix of a batch's single samples, in one process."""

    models: tuple[Literal["resnet18", "transformer"], ...] = ("resnet18", "transformer")
    """Networks."""
    n: tuple[int, ...] = (32, 64, 128, 256)
    """Samples in a batch."""
    rounds: int = 3
    """Passes of each kind. Higher narrows the spread."""
    longest: float = 20.0
    """Seconds. A way that took more for a pass is left out at larger n."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_samples(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchSamplesOptions, prog="gaf bench samples", args=words)
    for n in options.n:
        check_count("n", n, 1, MOST_BATCH)
    check_rounds(options)
    from gaf_lab.bench.samples import measure_samples, sample_table
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    with Progress(console, "measurement") as progress:
        sizes = options.models, options.n, options.rounds, options.longest
        found = measure_samples(*sizes, tell=progress)
    console.print(sample_table(found))
    if options.out is not None:
        write_measurements(found, options.out, {})
        say(console, f"Figures: {options.out}")
    return 0
