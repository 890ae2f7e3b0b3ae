"""`gaf bench ddp`: time, bytes and memory of a step among processes, or what a model predicts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import check_sizes
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.choices import ModelName

MOST_PROCESSES = 256


@dataclass
class BenchDDPOptions:
    """Time, bytes and memory of a step among k processes: plain DDP, gaf.attach, all gradients
    gathered."""

    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    b: int = 32
    """Samples per process."""
    k: tuple[int, ...] = (2, 4, 8)
    """Processes, one thread each."""
    rounds: int = 20
    """Steps of each kind, at least 2. Higher narrows the spread."""
    rules: bool = False
    """Measures other rules instead: Median, SignAgreement, and TorchJD's UPGrad, if installed."""
    out: Path | None = None
    """File for the figures, JSON lines."""
    predict: bool = False
    """Measures nothing; prints the predictions of the cost model of docs/cost.md."""
    against: Path | None = None
    """A file that --out wrote; its figures are shown beside the predicted ones."""
    latency_us: float = 20.0
    """Microseconds a message takes."""
    bandwidth_gbit: float | None = None
    """Gigabits per second that a rank sends.
    Without it 10, or with --against the file's limit, or the best fit to its plain DDP."""
    memory_gb: float = 10.0
    """Gigabytes per second that a rank reads from memory."""
    gflops: float = 30.0
    """Billions of operations per second of the Gram matrix's product.
    A CPU core's are in float32, a GPU's in float64."""
    parameters: int = 11_227_812
    """Coordinates of the gradient; the default is resnet18's with 100 classes."""
    bytes: int = 4
    """Bytes per coordinate."""


def run_bench_ddp(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchDDPOptions, prog="gaf bench ddp", args=words)
    if options.predict or options.against is not None:
        return predict(options, console)
    check_sizes(options, 2, MOST_PROCESSES)
    from gaf_lab.bench.ddp import ddp_conditions, measure_ddp, table
    from gaf_lab.bench.ddp_rank import DDPSetup
    from gaf_lab.bench.ways import RULE_WAYS, WAYS
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    wanted = DDPSetup(
        options.model,
        options.stem,
        options.b,
        options.rounds,
        ways=RULE_WAYS if options.rules else WAYS,
    )
    with Progress(console, "part") as progress:
        found = measure_ddp(wanted, options.k, tell=progress)
    console.print(table(found))
    if options.out is not None:
        write_measurements(found, options.out, ddp_conditions(wanted))
        say(console, f"Figures: {options.out}")
    return 0


def check_network(options: BenchDDPOptions) -> None:
    for name in ("latency_us", "bandwidth_gbit", "memory_gb", "gflops", "parameters", "bytes"):
        value = getattr(options, name)
        holds = value is None or (0 < value < math.inf) or (value == 0 and name == "latency_us")
        if not holds:
            raise ConfigError(
                f"{name} must be above 0 and finite; got {value}. Leave it out for a usual value."
            )


def predict(options: BenchDDPOptions, console: Console) -> int:
    """Prints what the cost model predicts, beside measured values if --against has a file."""
    from gaf_lab.bench.cost_model import Network
    from gaf_lab.bench.predictions import measured_table, read_points, table

    check_network(options)
    points: list[dict[str, Any]] = []
    gbit, source = options.bandwidth_gbit or 10.0, "as given"
    if options.against is not None:
        conditions, points = read_points(options.against)
        gbit, source = bandwidth(options, conditions, points)
    network = Network(
        options.latency_us * 1e-6, gbit * 1e9 / 8, options.memory_gb * 1e9, options.gflops * 1e9
    )
    local = f"memory {options.memory_gb:g} GB/s, {options.gflops:g} Gflop/s"
    say(console, f"{options.latency_us:g} us a message, {gbit:.3g} Gbit/s ({source}), {local}")
    if points:
        console.print(measured_table(points, network))
    else:
        console.print(table(options.parameters * options.bytes, network))
    return 0


def bandwidth(
    options: BenchDDPOptions, conditions: dict[str, Any], points: list[dict[str, Any]]
) -> tuple[float, str]:
    """Gigabits per second of the file's network, and their source."""
    from gaf_lab.bench.predictions import fitted_beta

    if options.bandwidth_gbit is not None:
        return options.bandwidth_gbit, "as given"
    if "mbit" in conditions:
        return conditions["mbit"] / 1000, "the limit under which the file was measured"
    beta = fitted_beta(points, options.latency_us * 1e-6)
    return beta * 8e-9, "fitted to the file's plain DDP"
