"""The inputs of the next steps from the host, made ahead: a row for each step.

They are the very draws of `Problem.micro_batch`.
"""

import torch
from torch import Tensor

from gaf_lab.data.problem import Problem
from gaf_lab.settings.config import TrainConfig

AHEAD = 64  # steps for which tables are made, and after which the log is fetched at the latest

Tables = dict[str, Tensor]


def zero_tables(rows: int, config: TrainConfig, planned: bool, device: torch.device) -> Tables:
    """Tables of zeros.

    index: (rows, k, b) int64, the samples of each micro-batch.
    rates: (rows,) float32, learning rates.
    shifts: (rows, k, 3, b, 1) int64, if pictures are augmented.
    weights: (rows, k) float64, if the policy's decisions are known before.
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
    first = step * config.k
    index = [problem.sampler.draw(first + i) for i in range(config.k)]
    found = {"index": torch.stack(index)}
    if config.augment:
        found["shifts"] = torch.stack([problem.shifts(step, i) for i in range(config.k)])
    return found
