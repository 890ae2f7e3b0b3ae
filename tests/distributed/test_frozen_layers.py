"""Layers that are frozen, thawed or ignored."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import RATE, deep, difference, loss, momentum, net, values
from helpers.problems import micro_gradients, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def freeze_after_wrapping(late: bool) -> None:
    """Buckets smaller than the layers, some of which hold nothing but what is frozen."""
    ends = []
    for filtered in (False, True):
        model = deep()
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6, find_unused_parameters=True)
        if not late:
            model[0].requires_grad_(False)
        optimizer = momentum(model)
        handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0)) if filtered else None
        for step in range(4):
            model[0].requires_grad_(step in (2,) if not late else step not in (1, 2))
            optimizer.zero_grad()
            loss(wrapped, step).backward()
            optimizer.step()
        if handle is not None:
            assert (handle.stats()["steps"], handle.stats()["stepped"]) == (4, 4)
        ends.append(values(model))
    assert difference(*ends) < 1e-6


@pytest.mark.parametrize("late", [False, True])
def test_layers_may_be_frozen_and_thawed_again(world: World, late: bool) -> None:
    world(2).run(freeze_after_wrapping, late)


def thaw(late: bool) -> None:
    model = deep()
    model[0].requires_grad_(False)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    if not late:
        model[0].requires_grad_(True)
        with pytest.raises(ValueError, match=r"'0.weight' was frozen then. Wrap the model again"):
            gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
        return
    gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    model[0].requires_grad_(True)
    loss(wrapped, 0).backward()
    before = values(model)
    with pytest.raises(ValueError, match=r"'0.weight' was frozen then. Wrap the model again"):
        optimizer.step()
    assert difference(values(model), before) == 0


@pytest.mark.parametrize("late", [False, True])
def test_layers_thawed_after_wrapping_are_refused_by_name(world: World, late: bool) -> None:
    world(2).run(thaw, late)


def ignore_parameters() -> None:
    """What DDP is told to ignore is the user's own, also on a skip."""
    model = net(6, 8, 3)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.bias"])
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    before = values(model)
    loss(wrapped, 0).backward()
    expected = before[3] - RATE * model[2].bias.grad
    optimizer.step()
    assert difference(values(model)[:3], before[:3]) == 0
    assert torch.equal(model[2].bias, expected)


def test_parameters_that_ddp_ignores_are_left_alone(world: World) -> None:
    world(2).run(ignore_parameters)


def thaw_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = net(6, 8, 3)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    model[0].requires_grad_(False)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"].get_group())
    for step, (first, second) in enumerate(((False, True), (True, True), (True, False))):
        model[0].requires_grad_(first)
        model[2].requires_grad_(second)
        twin = net(6, 8, 3)
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q.full_tensor())  # type: ignore[attr-defined]
        rows = micro_gradients(twin, step, 2, loss)
        keep = torch.cat(
            [
                torch.full((p.numel(),), q.requires_grad)
                for p, q in zip(twin.parameters(), model.parameters(), strict=True)
            ]
        )
        _, right = gaf.aggregate(rows * keep, gaf.GAF(2.0))
        optimizer.zero_grad()
        loss(model, step).backward()
        assert handle.last is not None
        torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
        optimizer.step()
    same_everywhere(*(p.to_local() for p in model.parameters()))  # type: ignore[attr-defined]
    handle.detach()


def test_sharded_layers_may_be_thawed_after_attach(world: World) -> None:
    world(2).run(thaw_shards)
