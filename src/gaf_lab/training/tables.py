"""The inputs of the next steps from the host, made ahead: a row for each step.

They are the very draws of `RunData.micro_batch`.
"""

import torch
from torch import Tensor

from gaf_lab.data.run_data import RunData

AHEAD = 64  # steps for which tables are made, and after which the log is fetched at the latest

Tables = dict[str, Tensor]


def zero_tables(rows: int, data: RunData, planned: bool) -> Tables:
    """Tables of zeros.

    index: (rows, k, b) int64, the samples of each micro-batch.
    rates: (rows,) float32, learning rates.
    augment: (rows, k, ...), what is drawn to augment inputs, if they are augmented.
    weights: (rows, k) float64, if the policy's decisions are known before.
    """
    k, b = data.config.k, data.config.b
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "index": ((k, b), torch.int64),
        "rates": ((), torch.float32),
    }
    drawn = data.augmentation(0, 0)
    if drawn is not None:
        shapes["augment"] = (k, *drawn.shape), drawn.dtype
    if planned:
        shapes["weights"] = (k,), torch.float64
    return {
        name: torch.zeros(rows, *shape, dtype=dtype, device=data.device)
        for name, (shape, dtype) in shapes.items()
    }


def draws(data: RunData, step: int) -> Tables:
    """A step's rows of `index` and `augment`, on the CPU."""
    k = data.config.k
    index = [data.sampler.draw(step * k + i) for i in range(k)]
    found = {"index": torch.stack(index)}
    drawn = [data.augmentation(step, i) for i in range(k)]
    augmented = [numbers for numbers in drawn if numbers is not None]
    if augmented:
        found["augment"] = torch.stack(augmented)
    return found
