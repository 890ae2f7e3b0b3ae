"""`gaf bench samples`: what K of single samples costs, and a step that judges its samples."""

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
    """Time and memory of the Gram matrix of a batch's single samples, and the time of a training
    step with gaf.SampleAgreement; in one process."""

    parts: tuple[Literal["gram", "step"], ...] = ("gram", "step")
    """What is measured."""
    models: tuple[Literal["resnet18", "transformer"], ...] = ("resnet18", "transformer")
    """For gram: networks."""
    n: tuple[int, ...] = (32, 64, 128, 256)
    """For gram: samples in a batch."""
    longest: float = 20.0
    """For gram: seconds. A way that took more for a pass is left out at larger n."""
    b: int = 100
    """For step: samples of a step."""
    block: int = 5
    """For step: steps between two looks at the clock."""
    rounds: int = 3
    """Passes of each kind; for step, blocks. Higher narrows the spread."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_samples(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchSamplesOptions, prog="gaf bench samples", args=words)
    for n in options.n:
        check_count("n", n, 1, MOST_BATCH)
    check_rounds(options)
    check_count("b", options.b, 2, MOST_BATCH, "BatchNorm needs two samples.")
    check_count("block", options.block, 1, MOST_BATCH)
    from gaf_lab.bench.samples import measure_samples, sample_table
    from gaf_lab.bench.samples_step import agreement_table, measure_agreement
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    found: list[Any] = []
    tables = []
    with Progress(console, "measurement") as progress:
        if "gram" in options.parts:
            sizes = options.models, options.n, options.rounds, options.longest
            found += (grams := measure_samples(*sizes, tell=progress))
            tables.append(sample_table(grams))
        if "step" in options.parts:
            given = options.b, options.rounds, options.block
            found += (steps := measure_agreement(*given, tell=progress))
            tables.append(agreement_table(steps))
    for table in tables:
        console.print(table)
    if options.out is not None:
        write_measurements(found, options.out, {})
        say(console, f"Figures: {options.out}")
    return 0
