"""What the next steps of a run need from the host, made ahead: a row for each step, by the very draws that `Problem.micro_batch` makes."""

import copy
import warnings

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from gaf_lab.data.problem import Problem
from gaf_lab.settings.config import TrainConfig

Tables = dict[str, Tensor]


def empty(rows: int, config: TrainConfig, planned: bool, device: torch.device) -> Tables:
    """Tables of zeros.

    index: (rows, k, b) int64, which samples each micro-batch holds.
    rates: (rows,) float32, learning rates.
    shifts: (rows, k, 3, b, 1) int64, where pictures are augmented.
    weights: (rows, k) float64, where the policy's decisions are known before.
    """
    k, b = config.k, config.b
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "index": ((k, b), torch.int64),
        "rates": ((), torch.float32),
    }
    if config.augment:
        shapes["shifts"] = (k, 3, b, 1), torch.int64
    if planned:
        shapes["weights"] = (k,), torch.float64
    return {
        name: torch.zeros(rows, *shape, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes.items()
    }


def draws(problem: Problem, step: int) -> Tables:
    """A step's rows of `index` and `shifts`, on the CPU."""
    config = problem.config
    found = {
        "index": torch.stack([problem.sampler.draw(step * config.k + i) for i in range(config.k)])
    }
    if config.augment:
        found["shifts"] = torch.stack([problem.shifts(step, i) for i in range(config.k)])
    return found


def rates_ahead(scheduler: LRScheduler, count: int) -> list[float]:
    """The learning rate now and after each of the next count - 1 calls of the scheduler's step(); it stays as it is."""
    twin = copy.copy(scheduler)  # of a gated one, one that nobody gates
    group = scheduler.optimizer.param_groups[0]
    twin.optimizer = torch.optim.SGD([torch.zeros(1)], lr=group["lr"])
    twin.optimizer.param_groups[0]["initial_lr"] = group["initial_lr"]
    rates = [group["lr"]]
    with warnings.catch_warnings():
        # nothing steps here
        warnings.filterwarnings(
            "ignore", "(Detected call of `lr_scheduler|Seems like `optimizer).step"
        )
        for _ in range(count - 1):
            twin.step()
            rates.append(twin.optimizer.param_groups[0]["lr"])
    return rates
