"""gaf.attach under policies of any kind, against the same rule on the stacked rows in float64."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_fsdp import shard_model, whole_grad, whole_tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import equal, values
from helpers.by_coordinate import RULES, expected_update
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
    from helpers import torchjd_rules
    from helpers.torchjd_rules import weighting

    for name in sorted(set(torchjd_rules.RULES) - {"Krum"}):  # which needs more rows

        def oracle(rows: Tensor, step: int, name: str = name) -> Tensor:
            return weighting(name)(rows @ rows.T) @ rows

        def without_broken(rows: Tensor, step: int, oracle: Any = oracle) -> Tensor:
            return oracle(rows[torch.arange(len(rows)) != BROKEN], step)

        follow(weighting(name), oracle, plain_loss)
        follow(weighting(name), without_broken, loss_with_nan)


def test_torchjds_weightings(world: World) -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    world(2).run(follow_torchjd)


# ------------------------------------------------------------------------- coordinate by coordinate


def oracle_of(name: str, rows: Tensor, step: int) -> Tensor | None:
    return expected_update(name, rows)


def follow_by_coordinate() -> None:
    W = dist.get_world_size()
    for name, (make, _, least) in RULES.items():
        for loss in (plain_loss, loss_with_nan):
            if least <= W:
                follow(
                    make(), lambda rows, step, name=name: expected_update(name, rows), loss, Wide
                )


@pytest.mark.parametrize("W", [2, 3, 4])
def test_coordinatewise_rules_and_absent_rows(world: World, W: int) -> None:
    world(W).run(follow_by_coordinate)


def mask_at_random() -> float:
    """The share of coordinates that moved."""
    model, optimizer, handle = wrap(gaf.RandomMask(0.3), Wide)
    masks = []
    for step in range(2):
        rows = micro_gradients(model.module, step, dist.get_world_size())
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        update = flat_grad(model)
        masks.append(update != 0)
        close(update, rows.mean(0) * masks[-1], rows)
        same_everywhere(update)
        optimizer.step()
    handle.detach()
    overlap = (masks[0] & masks[1]).double().mean().item()
    assert abs(overlap - 0.09) < 0.01  # six standard deviations of 68,000 draws
    return masks[0].double().mean().item()


def test_a_random_mask_keeps_a_share_of_the_mean(world: World) -> None:
    for share in world(3).run(mask_at_random):
        assert abs(share - 0.3) < 0.011


def replicas_by_coordinate() -> None:
    """HSDP: rows are replicas, each sharded over two ranks; then a flat model, group by group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for make, oracle in (
        (gaf.Median, lambda rows: expected_update("Median", rows)),
        (partial(gaf.SignAgreement, 2), lambda rows: expected_update("SignAgreement", rows)),
        (lambda: norm_weights, lambda rows: gaf.aggregate(rows, norm_weights)[0]),
    ):
        check_sharded(mesh["shard"], make(), oracle, 2, group=mesh["replicate"].get_group())
    flat = init_device_mesh("cpu", (4,))
    for name in ("Median", "SignAgreement"):
        policy = RULES[name][0](scope="group")
        check_sharded(flat, policy, lambda rows, name=name: expected_update(name, rows), 1)


def check_sharded(mesh: Any, policy: Any, oracle: Any, shards: int, **options: Any) -> None:
    model = shard_model(Wide, mesh)
    torch.manual_seed(5)
    twin = Wide()
    optimizer = SGD(model.parameters(), 0.1)
    handle = gaf.attach(model, optimizer, policy, **options)
    W = dist.get_world_size()
    for step in range(2):
        whole_tensors(model, twin)
        rows = micro_gradients(twin, step, W).view(W // shards, shards, -1).mean(1)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        close(whole_grad(model), oracle(rows), rows)
        optimizer.step()
    handle.detach()


def test_sharded_models(world: World) -> None:
    world(4).run(replicas_by_coordinate)
