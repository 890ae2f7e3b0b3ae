"""gaf.attach under policies of any kind, against the same rule on the stacked rows in float64."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import equal, values
from helpers.problems import (
    Odd,
    Wide,
    close,
    flat_grad,
    micro_gradients,
    plain_loss,
    same_everywhere,
)
from helpers.ranks import World

pytestmark = pytest.mark.distributed
BROKEN = 1  # the rank whose loss is NaN


def loss_with_nan(model: nn.Module, step: int, rank: int) -> Tensor:
    loss = plain_loss(model, step, rank)
    return loss * math.nan if rank == BROKEN else loss


def wrap(policy: Any, make: type[nn.Module] = Odd) -> tuple[nn.Module, Any, gaf.Handle]:
    torch.manual_seed(3)
    model = DistributedDataParallel(make(), bucket_cap_mb=0.002)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    return model, optimizer, gaf.attach(model, optimizer, policy)


def follow(policy: Any, oracle: Any, loss: Any, make: type[nn.Module] = Odd) -> None:
    """Three steps; oracle: (rows, step) -> the update, or None for a skip."""
    model, optimizer, handle = wrap(policy, make)
    for step in range(3):
        rows = micro_gradients(model.module, step, dist.get_world_size(), loss)
        expected, before = oracle(rows, step), values(model)
        optimizer.zero_grad()
        loss(model, step, dist.get_rank()).backward()
        assert handle.last is not None
        assert bool(handle.last.stepped) == (expected is not None)
        close(
            flat_grad(model), rows.new_zeros(rows.shape[1]) if expected is None else expected, rows
        )
        optimizer.step()
        same_everywhere(handle.last.weights, *model.parameters())
        assert equal(model, before) == (expected is None)
    handle.detach()


# ------------------------------------------------------------------------------------ plain weights


def norm_weights(gram: Tensor) -> Tensor:
    return (1 / gram.diagonal().sqrt() / len(gram)).float()


def draw(gram: Tensor) -> Tensor:
    return torch.rand(len(gram))


def skip(gram: Tensor) -> Tensor:
    return torch.zeros(len(gram))


def follow_weights() -> None:
    torch.manual_seed(dist.get_rank())  # as for data augmentation
    for policy in (norm_weights, draw, skip):

        def oracle(rows: Tensor, step: int, policy: Any = policy) -> Tensor | None:
            update, decision = gaf.aggregate(rows, policy)
            return update if decision.stepped else None

        if policy is not draw:
            follow(policy, oracle, plain_loss, Wide)
    model, optimizer, handle = wrap(draw)
    for step in range(2):
        torch.manual_seed(step * 10 + dist.get_rank())
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        assert handle.last is not None
        same_everywhere(handle.last.weights, *(p.grad for p in model.parameters()))
    handle.detach()


def test_ranks_step_by_plain_weights_and_draw_alike(world: World) -> None:
    world(3).run(follow_weights)


def follow_torchjd() -> None:
    from helpers.torchjd_rules import RULES, weighting

    for name in sorted(set(RULES) - {"Krum"}):  # which needs more rows

        def oracle(rows: Tensor, step: int, name: str = name) -> Tensor:
            return weighting(name)(rows @ rows.T) @ rows

        def without_broken(rows: Tensor, step: int, oracle: Any = oracle) -> Tensor:
            return oracle(rows[torch.arange(len(rows)) != BROKEN], step)

        follow(weighting(name), oracle, plain_loss)
        follow(weighting(name), without_broken, loss_with_nan)


def test_torchjds_weightings(world: World) -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    world(2).run(follow_torchjd)
