"""What a step of gaf.Accumulator costs, over plain accumulation in the same round."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gaf
from gaf_lab.training import models
from gpu_parts.common import Batch, Line, Options, Step, ratios, sgd, silence

PLAIN = "plain accumulation"
WAYS: dict[str, Any] = {
    PLAIN: None,
    "Mean()": gaf.Mean,
    "GAF(2.0)": partial(gaf.GAF, 2.0),  # accepts every row: the most work
    "GAF(2.0, start='best')": partial(gaf.GAF, 2.0, start="best"),
}


def ratios_of_accumulator(options: Options) -> Iterator[Line]:
    """ResNet18 on 32x32 pictures, four micro-batches of 100.

    In float32, under bfloat16 autocast, and with bfloat16 parameters.
    """
    silence()
    share = Options(options.device, options.seconds / 3, options.rounds, options.small)
    for name, dtype, autocast in (
        ("float32", torch.float32, False),
        ("autocast bfloat16", torch.float32, True),
        ("bfloat16 parameters", torch.bfloat16, False),
    ):
        steps = {way: make_step(share, make, dtype, autocast) for way, make in WAYS.items()}
        yield from ratios(share, f"Accumulator, {name}", PLAIN, steps)


def make_step(options: Options, make: Any, dtype: torch.dtype, autocast: bool) -> Step:
    """Of a fresh model, warm."""
    torch.manual_seed(0)
    name, size, k = ("convnet", 8, 2) if options.small else ("resnet18", 100, 4)
    model = models.make_model(name, (3, 32, 32), 100, "imagenet")  # type: ignore[arg-type]
    model = model.to(options.device, dtype)
    batch = (
        torch.randn(size, 3, 32, 32, device=options.device, dtype=dtype),
        torch.randint(100, (size,), device=options.device),
    )
    optimizer = sgd(model)
    acc = None if make is None else gaf.Accumulator(optimizer, make())
    loss = partial(loss_of, options, autocast, model, batch)

    def step() -> None:
        for _ in range(k):
            if acc is None:
                (loss() / k).backward()
            else:
                acc.backward(loss())
        if acc is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            acc.step()

    for _ in range(3):
        step()
    return step


def loss_of(options: Options, autocast: bool, model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.autocast(options.device.type, torch.bfloat16, enabled=autocast):
        scores = model(batch[0])
    return cross_entropy(scores.float(), batch[1])
