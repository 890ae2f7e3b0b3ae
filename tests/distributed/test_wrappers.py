"""Whose step a skip is: models that are wrapped again, share a step, or are attached once."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import (
    RATE,
    Heads,
    difference,
    head_loss,
    loss,
    momentum,
    net,
    train_plainly,
    values,
)
from helpers.problems import micro_gradients
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def wrap_again(deleted: bool) -> None:
    model = net(6, 8, 3)
    optimizer = momentum(model)
    first = DistributedDataParallel(model)
    old = gaf.attach(first, optimizer, gaf.GAF(0.0))
    loss(first, 0).backward()
    optimizer.step()
    assert old.last is not None
    assert not old.last.stepped
    second = DistributedDataParallel(model)
    if not deleted:
        with pytest.raises(RuntimeError, match=r"must not be attached already.*Call detach\(\)"):
            gaf.attach(second, optimizer, gaf.GAF(2.0))
        old.detach()
    del first
    handle = gaf.attach(second, optimizer, gaf.GAF(2.0))
    assert not old.attached
    for step in range(1, 4):
        optimizer.zero_grad()
        loss(second, step).backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 3
    assert difference(values(model), train_plainly(range(1, 4))) < 1e-6


@pytest.mark.parametrize("deleted", [True, False])
def test_a_model_that_is_wrapped_again_moves_as_its_new_handle_says(
    world: World, deleted: bool
) -> None:
    world(2).run(wrap_again, deleted)


def reduce_by_hand(overflow: bool) -> None:
    """After a skip, a step of the user's own, on gradients averaged by hand under no_sync."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    scaler = GradScaler("cpu", init_scale=2.0) if overflow else None
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0), scaler=scaler)
    if scaler is None:
        loss(wrapped, 0).backward()
        optimizer.step()
    else:  # a GradScaler does not call the optimizer: the skip waits
        scaler.scale(loss(wrapped, 0) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert handle.last is not None
    assert not handle.last.stepped
    before = values(model)
    optimizer.zero_grad()
    with wrapped.no_sync():
        loss(wrapped, 1).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    expected = [p - RATE * p.grad for p in model.parameters()]
    optimizer.step()
    assert difference(values(model), expected) < 1e-6
    assert difference(values(model), before) > 0.01


@pytest.mark.parametrize("overflow", [False, True])
def test_a_skip_does_not_reach_a_later_step_of_the_users_own(world: World, overflow: bool) -> None:
    world(2).run(reduce_by_hand, overflow)


def train_two_models() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 3)
    optimizer = SGD([*encoder.parameters(), *decoder.parameters()], RATE, momentum=0.9)
    first, second = DistributedDataParallel(encoder), DistributedDataParallel(decoder)
    one = gaf.attach(first, optimizer, gaf.GAF(0.0))
    two = gaf.attach(second, optimizer, gaf.GAF(2.0))
    for step in range(3):
        optimizer.zero_grad()
        before = values(encoder), values(decoder)
        loss(nn.Sequential(first, second), step).backward()
        assert one.last is not None
        assert two.last is not None
        assert not one.last.stepped
        assert two.last.stepped
        optimizer.step()
        assert difference(values(encoder), before[0]) == 0
        assert difference(values(decoder), before[1]) > 1e-4
    assert (one.stats()["steps"], one.stats()["stepped"]) == (3, 0)
    assert (two.stats()["steps"], two.stats()["stepped"]) == (3, 3)


def test_a_handle_acts_on_its_own_parameters_only(world: World) -> None:
    world(2).run(train_two_models)


def head_rows(model: Heads, which: int, step: int) -> Tensor:
    """(W, n): each rank's gradient of one head, zeros elsewhere."""
    return micro_gradients(
        model, step, 2, lambda twin, step, rank: loss(lambda x: twin(x, which), step, rank)
    )


def share_a_step(hybrid: bool, view: bool, scope: str) -> None:
    """Two synchronised passes over different heads, then one step: each head has its decision."""
    torch.manual_seed(0)
    model, twin = Heads(), Heads()
    model.body.requires_grad_(False)
    twin.body.requires_grad_(False)
    options: dict[str, Any] = {}
    if hybrid:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        options = {"group": mesh["replicate"]}
        for head in model.heads:
            fully_shard(head, mesh=mesh["shard"])
        wrapped = fully_shard(model, mesh=mesh["shard"])
    else:
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=view
        )
    optimizer = SGD(model.heads.parameters(), RATE, momentum=0.9, weight_decay=0.1)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope), **options)
    for step, taus in enumerate(((2.0, 2.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0))):
        optimizer.zero_grad()
        before = [whole_values(head) for head in model.heads]
        with torch.no_grad():
            for p, value in zip(twin.parameters(), whole_values(model), strict=True):
                p.copy_(value)
        for which, tau in enumerate(taus):
            handle.policy = gaf.GAF(tau, scope=scope)
            head_loss(wrapped, which, step).backward()
            right = gaf.aggregate(head_rows(twin, which, step), gaf.GAF(tau))[1]
            assert handle.last is not None
            if scope == "all":
                torch.testing.assert_close(
                    handle.last.distances, right.distances, rtol=0, atol=1e-6
                )
        optimizer.step()
        for head, old, tau in zip(model.heads, before, taus, strict=True):
            assert (difference(whole_values(head), old) == 0) == (tau == 0.0)
    if scope == "all":
        assert (handle.stats()["steps"], handle.stats()["stepped"]) == (8, 6)
    handle.detach()


def whole_values(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in values(model)]


@pytest.mark.parametrize(
    ("hybrid", "view", "scope"),
    [(False, False, "all"), (False, True, "all"), (True, False, "all"), (False, True, "group")],
)
def test_passes_over_different_parameters_may_share_a_step(
    world: World, hybrid: bool, view: bool, scope: str
) -> None:
    world(2).run(share_a_step, hybrid, view, scope)


def detach_in_between() -> None:
    """After the decision and before the step: the skip holds all the same."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    loss(wrapped, 0).backward()
    optimizer.step()  # there is momentum now
    optimizer.zero_grad()
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    loss(wrapped, 1).backward()
    before = values(model)
    handle.detach()
    optimizer.step()
    assert difference(values(model), before) == 0


def test_detaching_leaves_a_skip_in_place(world: World) -> None:
    world(2).run(detach_in_between)


def attach_twice() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    hybrid = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    flat = fully_shard(net(6, 8, 3), mesh=init_device_mesh("cpu", (4,)))
    plain = DistributedDataParallel(net(6, 8, 3))
    for model, scope, options in (
        (hybrid, "all", {"group": group}),
        (flat, "group", {}),
        (plain, "all", {}),
    ):
        optimizer = SGD(model.parameters(), RATE)
        first = gaf.attach(model, optimizer, gaf.GAF(0.0, scope=scope), **options)
        with pytest.raises(RuntimeError, match="must not be attached already"):
            gaf.attach(model, optimizer, gaf.GAF(0.0, scope=scope), **options)
        loss(model, 0).backward()
        assert first.last is not None
        assert first.last.distances[1] > 0.05
        optimizer.step()
        first.detach()
        optimizer.zero_grad()
        second = gaf.attach(model, optimizer, gaf.GAF(2.0, scope=scope), **options)
        loss(model, 0).backward()
        assert second.last is not None
        assert second.last.distances[1] > 0.05
        optimizer.step()
        assert second.stats()["stepped"] == second.stats()["steps"] >= 1


def test_a_model_is_attached_once_at_a_time(world: World) -> None:
    world(4).run(attach_twice)
