"""gaf.attach(..., unsharded=True): one exact decision over a flat FSDP2 model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import gaf
from gaf.ranks.fsdp_unsharded import KeptRows
from gaf_lab.bench.bytes_sent import counting
from helpers.problems import (
    KINDS,
    Odd,
    Wide,
    close,
    micro_gradients,
    plain_loss,
    same_everywhere,
    telling_tau,
)
from helpers.ranks import World

pytestmark = pytest.mark.distributed

Network = Callable[[], nn.Module]


def flat_model(make: Network, **more: Any) -> Any:
    """Every layer is a parameter group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(5)
    model = make()
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def rows_at(model: Any, make: Network, step: int, micro_group: int = 1) -> Tensor:
    """(k, n): all ranks' micro-gradients at the model's weights."""
    twin, W = make(), dist.get_world_size()
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(p.full_tensor())
    rows: Tensor = micro_gradients(twin, step, W).view(W // micro_group, micro_group, -1).mean(1)
    return rows


def whole_grad(model: Any) -> Tensor:
    return torch.cat([p.grad.full_tensor().double().reshape(-1) for p in model.parameters()])


def shards_of(model: Any) -> list[Tensor]:
    return [p.detach().to_local().clone() for p in model.parameters()]


def kept_coordinates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Coordinates that each decision finds in slices, and in what was not yet let go of."""
    held: list[int] = []
    receive = KeptRows.receive

    def counted(exchange: KeptRows) -> None:
        receive(exchange)
        parcels = exchange.parcels
        held.append(sum(parcel.slices.numel() + parcel.whole.numel() for parcel in parcels))

    monkeypatch.setattr(KeptRows, "receive", counted)
    return held


def check_exact(make: Network, micro_group: int) -> list[str]:
    W, rank, went = dist.get_world_size(), dist.get_rank(), []
    model = flat_model(make)
    optimizer = AdamW(model.parameters(), 0.01)
    handle = gaf.attach(model, optimizer, gaf.GAF(), micro_group=micro_group, unsharded=True)
    with pytest.MonkeyPatch.context() as patch:
        held = kept_coordinates(patch)
        for step, kind in enumerate(KINDS):
            rows = rows_at(model, make, step, micro_group)
            tau = telling_tau(rows, kind)
            update, decision = gaf.aggregate(rows, gaf.GAF(tau))
            handle.policy = gaf.GAF(tau)
            before = shards_of(model)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            with counting(W, dist.group.WORLD) as sent:
                plain_loss(model, step, rank).backward()
            assert handle.last is not None
            assert torch.equal(handle.last.accepted, decision.accepted)
            same_everywhere(handle.last.distances, handle.last.weights)
            close(whole_grad(model), update, rows)
            optimizer.step()
            moved = [not torch.equal(p, q) for p, q in zip(shards_of(model), before, strict=True)]
            assert any(moved) == bool(decision.stepped)
            went.append("step" if decision.stepped else "skip")
    n = sum(p.numel() for p in model.parameters())
    padding = W * sum(p.numel() // p.shape[0] for p in model.parameters())
    assert max(held) <= n + padding  # one unsharded gradient
    assert sent["isend"] <= 4 * (n + padding) * (W - 1) / W  # what a reduce-scatter sends
    assert handle.stats()["stepped"] == went.count("step")
    handle.detach()
    optimizer.zero_grad()
    rows = rows_at(model, make, 9)
    plain_loss(model, 9, rank).backward()
    close(whole_grad(model), rows.mean(0), rows)
    return went


@pytest.mark.parametrize(
    ("W", "make", "micro_group"), [(2, Odd, 1), (2, Wide, 1), (4, Odd, 2), (4, Wide, 1)]
)
def test_a_flat_model_is_filtered_exactly(
    world: World, W: int, make: type, micro_group: int
) -> None:
    for went in world(W).run(check_exact, make, micro_group):
        assert {"step", "skip"} == set(went)


def other_uses() -> None:
    rank, W = dist.get_rank(), dist.get_world_size()
    model = flat_model(Wide)
    optimizer = SGD(model.parameters(), 0.1)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), unsharded=True)
    # accumulated without synchronisation
    rows = rows_at(model, Wide, 0) + rows_at(model, Wide, 1)
    model.set_requires_gradient_sync(False)
    plain_loss(model, 0, rank).backward()
    model.set_requires_gradient_sync(True)
    plain_loss(model, 1, rank).backward()
    close(whole_grad(model), rows.mean(0), rows)
    # onto an update
    plain_loss(model, 2, rank).backward()
    with pytest.raises(RuntimeError, match="gradients must be cleared before a backward pass"):
        optimizer.step()
    # a layer is frozen, and thawed
    optimizer.zero_grad()
    model.layers[0].requires_grad_(False)
    plain_loss(model, 3, rank).backward()
    assert model.layers[0].weight.grad is None
    optimizer.step()
    optimizer.zero_grad()
    model.layers[0].requires_grad_(True)
    # a coordinate-wise rule, and a row that is broken
    handle.policy = gaf.Median()
    rows = rows_at(model, Wide, 4)
    loss = plain_loss(model, 4, rank)
    (loss * torch.nan if rank == 1 else loss).backward()
    others = torch.cat([rows[:1], rows[2:]])
    update, _ = gaf.aggregate(others, gaf.Median())
    close(whole_grad(model), update, rows)
    assert handle.last is not None
    assert handle.last.accepted.tolist() == [r != 1 for r in range(W)]
    # policies that average
    policies = gaf.Mean(), gaf.Mean(measure_every=1), gaf.Guard(), gaf.RandomSkip(1.0)
    for step, policy in enumerate(policies, 5):
        optimizer.zero_grad()
        handle.policy = policy
        rows = rows_at(model, Wide, step)
        plain_loss(model, step, rank).backward()
        close(whole_grad(model), rows.mean(0), rows)
        optimizer.step()
    assert handle.stats()["stepped"] == 5  # the first of these, on a part of the layers
    handle.detach()


def test_accumulation_frozen_layers_and_other_rules(world: World) -> None:
    world(4).run(other_uses)


def mixed_precision() -> None:
    rank = dist.get_rank()
    half = flat_model(Wide, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    gaf.attach(half, SGD(half.parameters(), 0.1), gaf.GAF(2.0), unsharded=True)
    rows = rows_at(half, Wide, 0)
    plain_loss(half, 0, rank).backward()
    assert half.layers[0].weight.grad.dtype == torch.float32
    close(whole_grad(half), rows.mean(0), rows, 0.02)
    narrow = flat_model(Wide, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))
    gaf.attach(narrow, SGD(narrow.parameters(), 0.1), gaf.GAF(2.0), unsharded=True)
    with pytest.raises(TypeError, match="reduced in float32 or bfloat16; got float16"):
        plain_loss(narrow, 0, rank).backward()


def overflow() -> None:
    """An infinite row on one rank: nobody steps, and every rank's scale falls."""
    rank = dist.get_rank()
    model = flat_model(Wide)
    optimizer = SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    gaf.attach(model, optimizer, gaf.GAF(2.0), scaler=scaler, unsharded=True)
    before = shards_of(model)
    loss = plain_loss(model, 0, rank)
    scaler.scale(loss * torch.inf if rank == 1 else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, q) for p, q in zip(shards_of(model), before, strict=True))


def refusals() -> None:
    model = flat_model(Wide)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="got two"):
        gaf.attach(model, optimizer, gaf.GAF(scope="group"), unsharded=True)
    with pytest.raises(TypeError, match="got two"):
        gaf.attach(model, optimizer, gaf.GAF(), group=dist.group.WORLD, unsharded=True)
    whole = DistributedDataParallel(Wide())
    with pytest.raises(TypeError, match="is for a flat FSDP2 model"):
        gaf.attach(whole, SGD(whole.parameters(), 0.1), gaf.GAF(), unsharded=True)


def test_precision_overflow_and_refusals(world: World) -> None:
    ranks = world(2)
    ranks.run(refusals)
    ranks.run(overflow)
    ranks.run(mixed_precision)
    ranks.broken = True  # FSDP2's own state is that of a pass that an exception ended
