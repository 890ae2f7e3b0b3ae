"""gaf.attach under FSDP2: replicas, exactly; a flat model, one decision per parameter group."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import SGD, AdamW

import gaf
from gaf.ranks.exchange import Exchange
from helpers.problems import (
    KINDS,
    Odd,
    Wide,
    batch,
    close,
    flat_grad,
    micro_gradients,
    plain_loss,
    same_everywhere,
    telling_tau,
)
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def shard_model(make: Callable[[], nn.Module], mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(5)
    model = make()
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_tensors(model: nn.Module, twin: nn.Module) -> None:
    """Fills `twin` with the model's parameters."""
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(p.full_tensor())  # type: ignore[attr-defined]


def whole_grad(model: nn.Module) -> Tensor:
    grads = [
        torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for p in model.parameters()
    ]
    return torch.cat([g.double().reshape(-1) for g in grads])


def local_state(model: nn.Module) -> list[Tensor]:
    return [p.detach().to_local().clone() for p in model.parameters()]


def buffers_held() -> list[int]:
    """Coordinates that each step from now on keeps beyond the gradient."""
    held: list[int] = []
    end = Exchange.end

    def counting(exchange: Exchange) -> None:
        held.append(sum(parcel.slices.numel() for parcel in exchange.parcels))
        end(exchange)

    Exchange.end = counting  # type: ignore[method-assign]
    return held


def check_replicas(
    replicas: int, shards: int, make: Callable[[], nn.Module], micro_group: int = 1
) -> list[str]:
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    model = shard_model(make, mesh["shard"])
    torch.manual_seed(5)
    twin = make()
    optimizer = AdamW(model.parameters(), 0.01)
    handle = gaf.attach(
        model, optimizer, gaf.GAF(), group=mesh["replicate"].get_group(), micro_group=micro_group
    )
    held = buffers_held()
    W, rank, went = replicas * shards, dist.get_rank(), []
    for step, kind in enumerate(KINDS):
        whole_tensors(model, twin)
        rows = (
            micro_gradients(twin, step, W)
            .view(replicas // micro_group, shards * micro_group, -1)
            .mean(1)
        )
        tau = telling_tau(rows, kind)
        update, decision = gaf.aggregate(rows, gaf.GAF(tau))
        expected, _ = gaf.reference(rows, tau)
        assert (expected is not None) == decision.stepped
        handle.policy = gaf.GAF(tau)
        before = local_state(model)
        optimizer.zero_grad()
        plain_loss(model, step, rank).backward()
        assert handle.last is not None
        assert torch.equal(handle.last.accepted, decision.accepted)
        same_everywhere(handle.last.distances, handle.last.weights)
        close(whole_grad(model), update, rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        moved = any(not torch.equal(p, q) for p, q in zip(local_state(model), before, strict=True))
        assert moved == (bool(decision.stepped) and any(len(p) for p in before))
        went.append("step" if decision.stepped else "skip")
    assert handle.stats()["stepped"] == went.count("step")
    # one gradient shard, and the joined pieces' padding
    assert max(held) <= sum(p.numel() for p in before) + 64 * replicas
    handle.detach()
    return went


@pytest.mark.parametrize("make", [Odd, Wide])
def test_replicas_of_a_sharded_model_are_filtered_exactly(world: World, make: type) -> None:
    for went in world(4).run(check_replicas, 2, 2, make):
        assert {"step", "skip"} == set(went)


def test_replicas_with_one_shard_each(world: World) -> None:
    """More replicas: what a flat data-parallel job is, on FSDP2's engine."""
    for went in world(3).run(check_replicas, 3, 1, Wide):
        assert {"step", "skip"} == set(went)


def test_micro_groups_of_replicas(world: World) -> None:
    for went in world(4).run(check_replicas, 4, 1, Wide, 2):
        assert {"step", "skip"} == set(went)


def accumulate() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = shard_model(Wide, mesh["shard"])
    torch.manual_seed(5)
    twin = Wide()
    optimizer = SGD(model.parameters(), 0.1)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"].get_group())
    rows = micro_gradients(twin, 0, 2) + micro_gradients(twin, 1, 2)
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    plain_loss(model, 0, dist.get_rank()).backward()
    model.set_requires_gradient_sync(True)
    plain_loss(model, 1, dist.get_rank()).backward()
    close(whole_grad(model), rows.mean(0), rows)
    plain_loss(model, 2, dist.get_rank()).backward()
    with pytest.raises(RuntimeError, match="gradients must be cleared before a backward pass"):
        optimizer.step()
    handle.detach()


def test_accumulation_without_synchronisation(world: World) -> None:
    world(2).run(accumulate)


class Sided(Odd):
    """Replica 1 leaves a layer out."""

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        return super().forward(x, side=dist.get_rank() == 0)


def leave_parameters_unused() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = shard_model(Sided, mesh["shard"])
    handle = gaf.attach(
        model, SGD(model.parameters(), 0.1), gaf.GAF(2.0), group=mesh["replicate"].get_group()
    )
    torch.manual_seed(5)
    rows = []
    for side in (True, False):
        twin = Odd()
        twin.load_state_dict(
            {key: value.full_tensor() for key, value in model.state_dict().items()}
        )
        x, y = batch(0, int(not side))
        nn.functional.cross_entropy(twin(x, side=side), y).backward()
        rows.append(flat_grad(twin))
    plain_loss(model, 0, dist.get_rank()).backward()
    close(whole_grad(model), torch.stack(rows).mean(0), torch.stack(rows))
    assert handle.last is not None
    assert handle.last.accepted.all()


def test_parameters_that_only_some_replicas_use(world: World) -> None:
    world(2).run(leave_parameters_unused)


def check_flat_model(tau: float) -> tuple[int, int]:
    """Each FSDP module's parameters get what the algorithm gives on their coordinates alone."""
    W = dist.get_world_size()
    mesh = init_device_mesh("cpu", (W,))
    model = shard_model(Wide, mesh)
    torch.manual_seed(5)
    twin = Wide()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    handle = gaf.attach(model, optimizer, gaf.GAF(tau, scope="group"))
    groups = [list(m.parameters()) for m in twin.modules() if isinstance(m, nn.Linear)]
    moved = stood = 0
    for step in range(4):
        whole_tensors(model, twin)
        rows = []
        for rank in range(W):
            copied = copy.deepcopy(twin)
            rows.append(
                dict(
                    zip(
                        twin.parameters(),
                        torch.autograd.grad(plain_loss(copied, step, rank), [*copied.parameters()]),
                        strict=True,
                    )
                )
            )
        optimizer.zero_grad()
        before = local_state(model)
        plain_loss(model, step, dist.get_rank()).backward()
        grads = {
            q: p.grad.full_tensor()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        }
        optimizer.step()
        after = {
            q: torch.equal(a, b)
            for a, b, q in zip(local_state(model), before, twin.parameters(), strict=True)
        }
        for params in groups:
            matrix = torch.stack([torch.cat([row[p].reshape(-1) for p in params]) for row in rows])
            update, decision = gaf.aggregate(matrix, gaf.GAF(tau))
            torch.testing.assert_close(
                torch.cat([grads[p].reshape(-1) for p in params]), update, rtol=1e-5, atol=1e-7
            )
            assert all(after[p] for p in params) == (not decision.stepped) or not all(
                len(b) for b in before
            )
            moved, stood = moved + bool(decision.stepped), stood + (not decision.stepped)
    assert handle.stats()["steps"] == 4 * len(groups)
    handle.detach()
    optimizer.zero_grad()
    whole_tensors(model, twin)
    rows_now = micro_gradients(twin, 9, W)
    plain_loss(model, 9, dist.get_rank()).backward()
    close(whole_grad(model), rows_now.mean(0), rows_now)
    return moved, stood


@pytest.mark.parametrize("W", [2, 3])
def test_a_flat_model_decides_group_by_group(world: World, W: int) -> None:
    for moved, stood in world(W).run(check_flat_model, 0.95):
        assert moved > 0
        assert stood > 0


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    both = shard_model(Odd, mesh)
    with pytest.raises(TypeError, match="the shard dimension of the mesh alone"):
        gaf.attach(
            both, SGD(both.parameters(), 0.1), gaf.GAF(), group=mesh["replicate"].get_group()
        )
    model = shard_model(Odd, mesh["shard"])
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match='scope="group".*got neither'):
        gaf.attach(model, optimizer, gaf.GAF())
    with pytest.raises(TypeError, match="got two"):
        gaf.attach(model, optimizer, gaf.GAF(scope="group"), group=mesh["replicate"].get_group())
    with torch.no_grad():
        model.scale.to_local().add_(dist.get_rank())
    with pytest.raises(ValueError, match="must start from the same weights"):
        gaf.attach(model, optimizer, gaf.GAF(), group=mesh["replicate"].get_group())


def test_what_cannot_work_is_refused(world: World) -> None:
    world(2).run(refusals)


def skip_with_one_replica() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    model = shard_model(Odd, mesh["shard"])
    optimizer = SGD(model.parameters(), 0.1)
    before = local_state(model)
    with pytest.warns(UserWarning, match="one row only"):
        handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"].get_group())
    handle.policy = gaf.RandomSkip(0.0)
    plain_loss(model, 0, 0).backward()
    optimizer.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"]) == (1, 0)
    assert all(map(torch.equal, before, local_state(model)))


def test_one_replica_is_decided_on_though_its_ranks_are_those_of_the_shards(world: World) -> None:
    world(1).run(skip_with_one_replica)


def first_version() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Odd(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"FSDP1.*Use FSDP2"):
        gaf.attach(model, SGD(model.parameters(), 0.1), gaf.GAF())


def test_the_first_fsdp_is_refused(world: World) -> None:
    world(1).run(first_version)
