"""A network with two BatchNorm layers, and micro-batches that move its statistics."""

import torch
from torch import Tensor, nn
from torch.optim import SGD

import gaf

K, SAMPLES = 4, 8


def norm_net() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()]
    second = [nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 3)]
    return nn.Sequential(*first, *second)


def norm_batches(macro: int = 0, k: int = K) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(macro)
    found = []
    for i in range(k):
        x = torch.randn(SAMPLES, 5, generator=generator) + i
        found.append((x, torch.randint(3, (SAMPLES,), generator=generator)))
    return found


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def accepted_only(model: nn.Module, tau: float, named: nn.Module | None = None) -> gaf.Accumulator:
    """An Accumulator with bn="accepted". named: the model as it runs, if it is wrapped."""
    optimizer = SGD(model.parameters(), 0.1)
    return gaf.Accumulator(optimizer, gaf.GAF(tau), model=named or model, bn="accepted")
