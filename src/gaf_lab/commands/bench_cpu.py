"""`gaf bench cpu`: which settings are fast on a CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import check_rounds
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.checks import ConfigError


@dataclass
class BenchCPUOptions:
    """Steps per second on the CPU: threads, channels-last, torch.compile; one process or many."""

    models: tuple[Literal["resnet18", "convnet", "mlp"], ...] = ("resnet18", "convnet", "mlp")
    """Networks: resnet18 and convnet in the paper's setting, mlp in the demo's."""
    compile: bool = True
    """Whether to measure torch.compile too; it takes minutes to start."""
    rounds: int = 10
    """Rounds, at least 2. Higher narrows the spread."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_cpu(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchCPUOptions, prog="gaf bench cpu", args=words)
    check_rounds(options)
    if not options.models:
        raise ConfigError("models must name at least one; got none. Leave it out for all.")
    from gaf_lab.bench.cpu import advice, measure_settings, table
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    with Progress(console, "round") as progress:
        found = measure_settings(options.models, options.rounds, options.compile, tell=progress)
    console.print(table(found))
    for model in options.models:
        say(console, f"{model}: {advice(found, model)}")
    if options.out is not None:
        write_measurements(found, options.out, {"rounds": options.rounds})
        say(console, f"Figures: {options.out}")
    return 0
