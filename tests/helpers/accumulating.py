"""What tests of gaf.Accumulator share: parameters, given rows, and two ways of holding rows."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

import gaf

AGREE, DISAGREE = [[1.0, 0.5], [1.0, 0.0]], [[1.0, 0.5], [-1.0, 0.0]]


def stacked(policy: Any) -> Callable[[Tensor], gaf.Decision]:
    """The same policy as a plain callable, which gets the Gram matrix of rows kept apart."""
    return lambda gram: policy(gram)


def streamed(policy: Any) -> Any:
    """The policy itself: rows are added up as they come."""
    return policy


ENGINES = pytest.mark.parametrize("wrap", [streamed, stacked])


def vector(n: int = 2, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(n, dtype=dtype))


def feed(
    acc: gaf.Accumulator, p: nn.Parameter, rows: Tensor | Iterable[Sequence[float] | Tensor]
) -> None:
    """Micro-gradients as they are given: the loss is <p, row>."""
    for row in rows:
        acc.backward((p * torch.as_tensor(row, dtype=p.dtype)).sum())


def line() -> tuple[nn.Linear, Optimizer]:
    """A model of four parameters and its optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, SGD(model.parameters(), lr=0.1)


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 3)).square().mean()


def state_of(optimizer: Optimizer) -> dict[Any, Any]:
    return copy.deepcopy(optimizer.state_dict()["state"])


def cpu_scaler(**options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, **options)


def scaler_for(scaled: bool) -> GradScaler | None:
    return GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaled else None


SCALED = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])

ROWS_OF_2 = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
ROWS_OF_3 = torch.tensor([[1.0, 2.0, -3.0], [1.0, 2.0, -2.0]])
ROWS_OF_4 = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0], [-3.0, 1.0, 0.5, -1.0]])
POLICIES = [
    gaf.GAF(1.5),
    gaf.GAF(1.5, average="halving"),
    gaf.GAF(1.5, start="best"),
    gaf.Mean(),
    gaf.RandomSkip(1.0),
]


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")
