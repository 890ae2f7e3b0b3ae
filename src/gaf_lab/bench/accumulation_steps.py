"""One step over k micro-batches: plain accumulation, and each policy of an Accumulator."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gaf
from gaf_lab.bench.timing import StepFunction
from gaf_lab.training import models

MICRO_BATCH = tuple[Tensor, Tensor]

PLAIN_ACCUMULATION = "plain accumulation"
POLICIES: dict[str, Any] = {
    "gaf.Mean()": gaf.Mean,
    "gaf.GAF()": lambda: gaf.GAF(2.0),  # accepts every row: the most work
    "gaf.GAF(start='best')": lambda: gaf.GAF(2.0, start="best"),
}


@dataclass(frozen=True)
class AccumulationSize:
    """A model and its micro-batch.

    Args:
        name: of the model.
        stem: first layers of a ResNet.
        b: samples of a micro-batch.
        hidden: units in each hidden layer of the mlp.
    """

    name: str = "resnet18"
    stem: models.Stem = "imagenet"
    b: int = 100
    hidden: int = 512

    @property
    def classes(self) -> int:
        return 10 if self.name == "mlp" else 100

    @property
    def pictures(self) -> tuple[int, int, int]:
        """Channels, height, width: MNIST's for the mlp, as in the demo; else those of CIFAR-100."""
        return (1, 28, 28) if self.name == "mlp" else (3, 32, 32)

    def make_model(self) -> nn.Module:
        if self.name == "mlp":
            return models.mlp(28 * 28, self.classes, self.hidden)
        return models.make_model(self.name, self.pictures, self.classes, self.stem)

    def make_batch(self) -> MICRO_BATCH:
        x = torch.randn(self.b, *self.pictures)
        return x, torch.randint(0, self.classes, (self.b,))

    def gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.make_model().parameters())

    def columns(self) -> dict[str, int]:
        return {"b": self.b} | ({"hidden": self.hidden} if self.name == "mlp" else {})


def make_accumulation_step(way: str, size: AccumulationSize, k: int) -> StepFunction:
    """A step of a fresh model: plain, or by one of the policies."""
    torch.manual_seed(0)
    model = size.make_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    batch = size.make_batch()
    if way == PLAIN_ACCUMULATION:
        return partial(plain_step, model, optimizer, batch, k)
    accumulator = gaf.Accumulator(optimizer, POLICIES[way]())
    return partial(accumulator_step, model, accumulator, batch, k)


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: MICRO_BATCH, k: int
) -> None:
    for _ in range(k):
        (nn.functional.cross_entropy(model(batch[0]), batch[1]) / k).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulator_step(
    model: nn.Module, accumulator: gaf.Accumulator, batch: MICRO_BATCH, k: int
) -> None:
    for _ in range(k):
        accumulator.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
    accumulator.step()
