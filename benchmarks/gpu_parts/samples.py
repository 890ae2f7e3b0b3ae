"""Rows that are samples: gaf.ghost_gram, gaf.Samples and gaf.SampleAgreement.

Each is compared with the gradients of single samples, which autograd gives.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf
from gpu_parts.common import (
    CLASSES,
    EXACT,
    FLOAT32,
    HALF,
    Found,
    Line,
    Options,
    batches,
    changes,
    flat,
    lines,
    relative,
    sgd,
    silence,
    state_of,
)

N = 24  # samples in a batch
LAYERS = ("convolutions", "words")
CLOSE = 1e-3  # of scores after some steps, each of which rounds


def samples(options: Options) -> Iterator[Line]:
    silence()
    torch.backends.cudnn.allow_tf32 = False  # else the reference is less exact than K
    for kind in LAYERS:
        yield from lines(f"ghost_gram, {kind}", partial(ghost, options, kind))
        yield from lines(f"Samples, {kind}", partial(stepped, options, kind))
    yield from lines("SampleAgreement", partial(judged, options))


def network(kind: str) -> tuple[nn.Module, Tensor]:
    """A network and its inputs (N, ...), on the CPU."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        if kind == "convolutions":
            first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, stride=2, groups=2)
            layers = first, nn.GroupNorm(2, 8), nn.ReLU(), second, nn.ReLU(), nn.Flatten()
            return nn.Sequential(*layers, nn.Linear(256, CLASSES)), torch.randn(N, 3, 12, 12)
        layers = nn.Embedding(50, 16), nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32)
        head = nn.Flatten(), nn.Linear(32 * 20, CLASSES)
        return nn.Sequential(*layers, *head), torch.randint(50, (N, 20))


def on_device(options: Options, kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = network(kind)
    y = torch.arange(N, device=options.device) % CLASSES
    return model.to(options.device), x.to(options.device), y


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).float(), y, reduction="none")


def rows_of_samples(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, n) float64 on the CPU, by one backward pass for each sample."""
    params = list(model.parameters())
    losses = losses_of(model, x, y)
    return torch.stack(
        [flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses]
    )


def ghost(options: Options, kind: str) -> Found:
    model, x, y = on_device(options, kind)
    expected = gaf.gram(rows_of_samples(model, x, y))
    with gaf.recording(model):
        losses = losses_of(model, x, y)
    found = gaf.ghost_gram(model, losses)
    yield "K, relative error", relative(found.cpu(), expected), 0.0, FLOAT32
    with gaf.recording(model), torch.autocast(options.device.type, torch.bfloat16):
        losses = losses_of(model, x, y)
    half = gaf.ghost_gram(model, losses)
    yield "K under autocast, relative error", relative(half.cpu(), expected), 0.0, HALF


def stepped(options: Options, kind: str) -> Found:
    """The update, then a skip."""
    model, x, y = on_device(options, kind)
    policy = gaf.GAF(0.97, start="best")
    update, expected = gaf.aggregate(rows_of_samples(model, x, y), policy)
    acc = gaf.Samples(model, sgd(model), policy)
    acc.backward(losses_of(model, x, y))
    decision = acc.decide()
    yield "accepted", decision.accepted.tolist(), expected.accepted.tolist(), EXACT
    error = relative(flat([p.grad for p in model.parameters()]), update)
    yield "update, relative error", error, 0.0, FLOAT32
    acc.step()
    before = state_of(model, acc.optimizers[0])
    acc.policy = gaf.RandomSkip(0.0)
    acc.backward(losses_of(model, x, y))
    acc.step()
    yield "tensors changed by a skip", changes(before, state_of(model, acc.optimizers[0])), 0, EXACT


def judged(options: Options) -> Found:
    """The same steps on the device and on the CPU give the same report."""
    bare, _ = network("convolutions")
    given = batches(8, torch.device("cpu"), torch.float32, N)
    found, expected = (
        report_of(copy.deepcopy(bare).to(device), given, device)
        for device in (options.device, torch.device("cpu"))
    )
    apart = torch.tensor(found["label_quality"]) - torch.tensor(expected["label_quality"])
    yield "label quality", float(apart.abs().max()), 0.0, CLOSE
    yield "columns", sorted(found), sorted(expected), EXACT


def report_of(model: Any, given: Any, device: torch.device) -> dict[str, list[Any]]:
    """Two passes over some batches."""
    criterion = gaf.SampleAgreement(nn.CrossEntropyLoss(reduction="none"), head=model[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number, (x, y) in [*enumerate(given)] * 2:
        index = torch.arange(N * number, N * (number + 1), device=device)
        loss = criterion(model(x.to(device)), y.to(device), index=index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return criterion.report()
