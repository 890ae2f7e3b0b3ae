"""`gaf bench train`: training steps per second in the paper's setting."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import check_rounds
from gaf_lab.commands.common import Words, say
from gaf_lab.settings.choices import ModelName


@dataclass
class BenchTrainOptions:
    """Training steps per second on CIFAR-100 in the paper's setting: averaging, GAF, plain loop."""

    data: Path | None = None
    """Folder with CIFAR-100's archive; without it, white noise of the same shape."""
    task: str = ""
    """A task of your own in place of pictures, as in gaf train; --data is passed to it."""
    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    k: int = 2
    """Micro-batches per step."""
    b: int = 100
    """Samples per micro-batch."""
    sampler: Literal["iid", "stratified-clean"] = "stratified-clean"
    """How micro-batches are drawn: in shuffled passes, or with as many of each class."""
    engine: Literal["auto", "plain", "device"] = "auto"
    """As in gaf train."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    rounds: int = 30
    """Rounds, at least 2: a step of each kind on the CPU, 64 on CUDA. Higher narrows the spread."""
    workers: tuple[int, ...] = (0,)
    """Processes of the plain loop's DataLoader; one row for each number."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_train(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchTrainOptions, prog="gaf bench train", args=words)
    check_rounds(options)
    from gaf_lab.bench.train import TrainSetup, measure_training
    from gaf_lab.bench.train_results import arm_table, part_table
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress
    from gaf_lab.training.make import pick_device

    given = {name: value for name, value in vars(options).items() if name not in ("data", "out")}
    wanted = TrainSetup(data_folder=options.data, **given)
    with Progress(console, "round") as progress:
        found = measure_training(wanted, tell=progress)
    say(
        console,
        options.task or ("white noise of CIFAR-100's shape", "CIFAR-100")[bool(options.data)],
    )
    console.print(arm_table(found))
    console.print(part_table(found))
    if options.out is not None:
        write_measurements(found, options.out, wanted.conditions(), pick_device(options.device))
        say(console, f"Figures: {options.out}")
    return 0
