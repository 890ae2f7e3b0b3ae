"""What an adapter must do, written out: rows by autograd, `gaf.aggregate`, a step or none."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler

import gaf

Batch = tuple[Tensor, Tensor]
K, BATCH, STEPS = 4, 6, 12


def samples(count: int) -> Batch:
    """Labels of which 40% say nothing: micro-gradients agree more or less."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(count, 13, generator=rng)
    noisy = torch.rand(count, generator=rng) < 0.4
    return x, torch.where(noisy, torch.randint(5, (count,), generator=rng), x[:, :5].argmax(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 31), nn.Tanh(), nn.Linear(31, 5))


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]).float(), batch[1])


def row(
    model: nn.Module, batches: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> Tensor:
    """(n,) the mean gradient of some batches."""
    total = sum(loss(model, batch) for batch in batches) / len(batches)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(model.parameters()))])


def follow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    macro_batches: Iterable[Sequence[Sequence[Batch]]],
    policy: Any,
    clip: float = float("inf"),
    loss: Callable[[nn.Module, Batch], Tensor] = mean_loss,
    advance: int = 1,
) -> list[bool]:
    """Trains on macro-batches of rows of batches. Returns which steps were taken.

    advance: scheduler steps for each.
    """
    taken = []
    for batches in macro_batches:
        update, decision = gaf.aggregate(
            torch.stack([row(model, each, loss) for each in batches]), policy
        )
        taken.append(bool(decision.stepped))
        if not taken[-1]:
            continue
        for p, part in zip(
            model.parameters(), update.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.grad = part.view_as(p).clone()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for _ in range(advance):
            scheduler.step()
    return taken


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def close(actual: nn.Module, expected: nn.Module) -> None:
    """To a relative 1e-6 of the weights: float32, and the order of sums differs."""
    error = (flat(actual) - flat(expected)).norm() / flat(expected).norm()
    assert error <= 1e-6, f"relative error {error:.2e}"


def reset_accelerate() -> None:
    """Resets how many micro-batches make a step: Accelerate keeps that for the whole process."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.GradientState._reset_state()


def set_launcher_environment() -> None:
    """Sets a launcher's environment. Not in a conftest: ranks import it by its module's name."""
    reset_accelerate()
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=world,
        LOCAL_WORLD_SIZE=world,
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )


def nearly_same(a: Any, b: Any) -> bool:
    """Nested: equal but for the last digits of what was measured.

    DistributedDataParallel lays buckets out otherwise in a first pass than in later ones, and how a
    BLAS rounds a sum can depend on where its terms lie.
    """
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(nearly_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(nearly_same, a, b))
    return a == b or (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-5))
