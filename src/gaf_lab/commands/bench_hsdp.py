"""`gaf bench hsdp`: time, bytes and memory of a step of a sharded model's replicas."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import check_batches_and_rounds, check_counts
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.choices import ModelName

MOST_SIDE = 16  # replicas, or shards


@dataclass
class BenchHSDPOptions:
    """Time, bytes and memory of a step of HSDP (FSDP2): plain, gaf.attach, all replicas
    gathered."""

    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    b: int = 32
    """Samples per process."""
    replicas: int = 2
    """Replicas of the model. Each is a row."""
    shards: int = 2
    """Processes of a replica, one thread each."""
    rounds: int = 10
    """Steps of each kind, at least 2. Higher narrows the spread."""
    memory: bool = True
    """Also measures the peak of memory of each way, in fresh processes."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_hsdp(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchHSDPOptions, prog="gaf bench hsdp", args=words)
    check_counts("replicas", (options.replicas,), 2, MOST_SIDE)
    check_counts("shards", (options.shards,), 1, MOST_SIDE)
    check_batches_and_rounds(options)
    from gaf_lab.bench.hsdp import hsdp_conditions, hsdp_table, measure_hsdp
    from gaf_lab.bench.hsdp_ways import HSDPSetup
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    sizes = options.b, options.replicas, options.shards, options.rounds
    wanted = HSDPSetup(options.model, options.stem, *sizes)
    with Progress(console, "part") as progress:
        found = measure_hsdp(wanted, options.memory, tell=progress)
    console.print(hsdp_table(found))
    if options.out is not None:
        write_measurements(found, options.out, hsdp_conditions(wanted))
        say(console, f"Figures: {options.out}")
    return 0
