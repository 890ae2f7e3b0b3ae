"""Models, losses and loops around gaf.attach."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.problems import Odd

RATE = 0.1
unchecked = inspect.unwrap(gaf.attach)  # without the tests' own check of its annotations
STATEFUL: dict[str, Callable[[], Any]] = {  # policies that every counted decision moves on
    "RandomSkip": lambda: gaf.RandomSkip(0.5, seed=1),
    "ScheduleTau": lambda: gaf.GAF(gaf.ScheduleTau([(0, 2.0), (10, 1.9)]), min_accepted=1),
}


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def deep() -> nn.Sequential:
    return net(6, 8, 8, 3)


def loss(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    rank = dist.get_rank() if rank is None else rank
    rng = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(5, 6, generator=rng), torch.randn(5, 3, generator=rng)
    return (model(x) - y).pow(2).mean()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


def momentum(model: nn.Module) -> SGD:
    """An optimizer that moves on zero gradients too: a skip must be more than those."""
    return SGD(model.parameters(), RATE, momentum=0.9, weight_decay=0.1)


def train_plainly(steps: range) -> list[Tensor]:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    for step in steps:
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
    return values(model)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.heads[which](torch.tanh(self.body(x)))


def head_loss(model: nn.Module, which: int, step: int) -> Tensor:
    return loss(lambda x: model(x, which), step)  # type: ignore[arg-type]


def attach_model(
    policy: Any,
    make: Callable[[], nn.Module] = Odd,
    lr: float = 0.05,
    scaler: GradScaler | None = None,
    **ddp: Any,
) -> tuple[DistributedDataParallel, Any, gaf.Handle]:
    torch.manual_seed(3)
    model = DistributedDataParallel(make(), **ddp)
    optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.01)
    return model, optimizer, gaf.attach(model, optimizer, policy, scaler=scaler)


def equal(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def row_loss(model: nn.Module, row: list[float]) -> Tensor:
    """The micro-gradient of a Vector model is this row."""
    return torch.dot(model(torch.ones(1)), torch.tensor(row))


class Vector(nn.Module):
    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.p * x


def which_moved(model: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 3)
        self.own = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.own[which](torch.tanh(self.shared(x)))


def branch_loss(model: nn.Module, which: int, step: int, rank: int | None = None) -> Tensor:
    return loss(lambda x: model(x, which), step, rank)  # type: ignore[arg-type]
