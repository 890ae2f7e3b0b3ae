"""What a step of gaf.Accumulator costs, over plain accumulation in the same round."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

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


class Setting(NamedTuple):
    """What is trained: four micro-batches of 100 pictures a step."""

    name: str
    pixels: int = 32
    dtype: torch.dtype = torch.float32
    autocast: bool = False


SETTINGS = (
    Setting("float32"),
    Setting("autocast bfloat16", autocast=True),
    Setting("bfloat16 parameters", dtype=torch.bfloat16),
    Setting("float32, 224 pixels", pixels=224),
    Setting("autocast bfloat16, 224 pixels", pixels=224, autocast=True),
)


def ratios_of_accumulator(options: Options) -> Iterator[Line]:
    """ResNet18. On 32x32 pictures a step is mostly calls, on 224x224 mostly arithmetic."""
    silence()
    seconds = options.seconds / len(SETTINGS)
    share = Options(options.device, seconds, options.rounds, options.small)
    for setting in SETTINGS:
        steps = {way: make_step(share, make, setting) for way, make in WAYS.items()}
        yield from ratios(share, f"Accumulator, {setting.name}", PLAIN, steps)


def make_step(options: Options, make: Any, setting: Setting) -> Step:
    """Of a fresh model, warm."""
    torch.manual_seed(0)
    name, size, k = ("convnet", 8, 2) if options.small else ("resnet18", 100, 4)
    pixels = 32 if options.small else setting.pixels
    shape = 3, pixels, pixels
    model = models.make_model(name, shape, 100, "imagenet")  # type: ignore[arg-type]
    model = model.to(options.device, setting.dtype)
    batch = (
        torch.randn(size, *shape, device=options.device, dtype=setting.dtype),
        torch.randint(100, (size,), device=options.device),
    )
    optimizer = sgd(model)
    acc = None if make is None else gaf.Accumulator(optimizer, make())
    loss = partial(loss_of, options, setting.autocast, model, batch)

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
