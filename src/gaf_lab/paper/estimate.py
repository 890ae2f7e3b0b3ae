"""How long runs will take: the seconds of a sample are measured here, once for each network."""

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from gaf_lab.progress import Tell, print_line, silent
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import Configs
from gaf_lab.settings.sizes import PICTURES, count_pictures, picture_shape
from gaf_lab.training import models
from gaf_lab.training.console import Progress

MOST_TIMED = 32  # samples in the batch that is timed, at most
LARGE = 50_000_000  # parameters; above it the batch is one sample
START_SECONDS = 1.0  # of a run, beside its steps and evaluations: data, network, records


def announce(
    configs: Configs, workers: int, console: Console, finished: Collection[str] = ()
) -> dict[str, float]:
    """Prints how long the runs will take, and returns the seconds of each by its hash.

    finished: hashes of those that are finished already.
    """
    with Progress(console, "network") as progress:
        seconds = run_seconds(configs, workers, progress)
    todo = [taken for config_hash, taken in seconds.items() if config_hash not in finished]
    about = format_estimate(sum(todo) / min(workers, len(todo)))
    print_line(
        console,
        f"About {about} on {workers} at a time, by a short measurement; the runs will correct it.",
    )
    return seconds


def format_estimate(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_seconds(configs: Configs, workers: int, tell: Tell = silent) -> dict[str, float]:
    """Seconds of each run by its hash, beside `workers` - 1 others. tell: reports the progress."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        networks, speeds = {network_key(c): c for c in configs}, {}
        for number, (key, config) in enumerate(networks.items(), 1):
            tell("measuring", number, len(networks))
            speeds[key] = sample_seconds(config)
    finally:
        torch.set_num_threads(threads)
    return {c.hash: cost(c, *speeds[network_key(c)]) for c in configs}


def network_key(config: TrainConfig) -> tuple[Any, ...]:
    """What the seconds per sample depend on."""
    return (
        config.model,
        config.stem,
        picture_shape(config),
        min(config.b, MOST_TIMED),
        config.autocast,
        config.device,
    )


def cost(config: TrainConfig, training: float, evaluation: float) -> float:
    """Seconds of a run, from the seconds of a sample in training and in evaluation."""
    used = count_pictures(config)
    tested = min(config.limit or PICTURES[config.dataset], PICTURES[config.dataset] // 5)
    evaluated = tested + min(config.probe, used) + config.heldout * used
    evaluations = config.passes / config.eval_every
    trained = config.passes * used * (1 - config.heldout) * (2 if config.sam else 1)
    return START_SECONDS + trained * training + evaluations * evaluated * evaluation


def sample_seconds(config: TrainConfig) -> tuple[float, float]:
    """Seconds per sample in training and in evaluation, for the network on random pictures."""
    from gaf_lab.training.make import pick_device

    device, shape = pick_device(config.device), picture_shape(config)
    model = models.make_model(config.model, shape, 100, config.stem).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    batch = 1 if parameters > LARGE else min(config.b, MOST_TIMED)
    x = torch.randn(batch, *shape, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def train() -> None:
        cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad = None

    trained = mean_seconds(train, device)
    return trained / batch, mean_seconds(lambda: run_forward(model, x), device) / batch


@torch.no_grad()
def run_forward(model: nn.Module, x: torch.Tensor) -> None:
    model(x)


def mean_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Mean of the second and third call; the first warms up."""
    work()
    started = time.perf_counter()
    for _ in range(2):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / 2
