"""A task that is no part of the project: noise around a plane, fitted by a small network."""

import torch
from torch import nn

from gaf_lab import Problem


def regression(config):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.1 * torch.randn(300, generator=draw)
    return Problem(
        model=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)),
        loss=lambda output, target: (output - target) ** 2,
        train=(x[:240], y[:240]),
        test=(x[240:], y[240:]),
    )
