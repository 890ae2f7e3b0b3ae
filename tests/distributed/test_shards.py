"""Coordinates that are spread over shards, meshes and other default devices."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import RATE, loss, momentum, net, unchecked
from helpers.problems import micro_gradients, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


class Halves(nn.Module):
    """Two layers over two ranks: the first by its columns, the second by its rows, as Megatron."""

    def __init__(self, group: Any, half: int) -> None:
        super().__init__()
        whole = net(6, 8, 3)
        rows = slice(4 * half, 4 * half + 4)
        self.group = group
        self.a = nn.Parameter(whole[0].weight.detach()[rows].clone())
        self.bias = nn.Parameter(whole[0].bias.detach()[rows].clone())
        self.b = nn.Parameter(whole[2].weight.detach()[:, rows].clone())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.a.T + self.bias) @ self.b.T
        return AddUp.apply(h, self.group)


class AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def train_over_shards(together: bool) -> tuple[bool, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = mesh["data"], mesh["tensor"]
    model = Halves(tensor.get_group(), tensor.get_local_rank())
    wrapped = DistributedDataParallel(model, process_group=data.get_group())
    optimizer = SGD(model.parameters(), RATE)
    whole = net(6, 8, 3)
    whole[2].bias = None  # type: ignore[assignment]
    rows = micro_gradients(whole, 0, 2, loss)
    _, right = gaf.aggregate(rows, gaf.GAF(2.0))
    tau = right.distances[1].item()
    options = {"shards": tensor} if together else {}
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(tau + 1e-3), **options)
    loss(wrapped, 0, data.get_local_rank()).backward()
    assert handle.last is not None
    if together:
        torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
        same_everywhere(handle.last.distances)
    handle.detach()
    return bool(handle.last.stepped), handle.last.distances[1].item()


def test_shards_decide_alike_where_their_gram_matrices_are_added_up(world: World) -> None:
    assert {stepped for stepped, _ in world(4).run(train_over_shards, True)} == {True}
    alone = world(4).run(train_over_shards, False)
    assert len({stepped for stepped, _ in alone}) == 2  # each half for itself: one steps, one skips


def give_wrong_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = net(6, 8, 3)
    wrapped = DistributedDataParallel(model, process_group=mesh["data"].get_group())
    optimizer = SGD(model.parameters(), RATE)
    for options, message in (
        ({"shards": mesh["data"]}, "must have this rank alone in common"),
        ({"shards": mesh}, "a mesh of one dimension"),
        ({"shards": "tensor"}, "shards must be a torch.distributed.ProcessGroup; got 'tensor'"),
        ({"shards": mesh["tensor"], "policy": gaf.GAF(scope="group")}, "scope must be 'all'"),
        ({"group": mesh}, "group must be a process group, or a mesh of one dimension"),
        ({"group": [0, 1]}, r"group must be a torch.distributed.ProcessGroup; got \[0, 1\]"),
        ({"scaler": 2.0}, "scaler must be a torch.amp.GradScaler or None; got float"),
        ({"micro_group": 1.0}, "micro_group must be a whole number"),
        ({"micro_group": True}, "micro_group must be a whole number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            unchecked(wrapped, optimizer, **({"policy": gaf.GAF()} | options))


def test_wrong_arguments_are_named(world: World) -> None:
    world(4).run(give_wrong_shards)


def give_meshes_and_numpy() -> None:
    import numpy as np

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    handle = unchecked(
        model,
        SGD(model.parameters(), RATE),
        gaf.GAF(2.0),
        group=mesh["replicate"],
        micro_group=np.int64(1),
    )
    loss(model, 0).backward()
    assert handle.last is not None
    assert len(handle.last.weights) == 2
    other = net(6, 8, 3)
    fully_shard(other, mesh=mesh["shard"], ignored_params=set(other[2].parameters()))
    with pytest.raises(ValueError, match=r"'2.weight' is not \(ignored_params\)"):
        gaf.attach(other, SGD(other.parameters(), RATE), gaf.GAF(), group=mesh["replicate"])
    other[2].requires_grad_(False)
    frozen = SGD(other[0].parameters(), RATE)
    handle = gaf.attach(other, frozen, gaf.GAF(2.0), group=mesh["replicate"])
    loss(other, 0).backward()
    frozen.step()
    assert handle.stats()["stepped"] == 1


def test_a_mesh_is_a_group_and_numpys_integers_are_integers(world: World) -> None:
    world(2).run(give_meshes_and_numpy)


def train_with_another_default_device(scope: str) -> list[float]:
    model = net(6, 8, 3)
    wrapped = DistributedDataParallel(model)
    found = []
    torch.set_default_device("meta")
    try:
        optimizer = momentum(model)
        handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope))
        for step, policy in enumerate(
            (gaf.GAF(2.0, scope=scope), gaf.Mean(), gaf.GAF(1.9, start="best"))
        ):
            handle.policy = policy
            optimizer.zero_grad()
            with torch.device("cpu"):
                value = loss(wrapped, step)
            value.backward()
            optimizer.step()
            assert handle.last is not None
            found.append(handle.last.weights.sum().item())
    finally:
        torch.set_default_device("cpu")
    return found


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("scope", ["all", "group"])
def test_another_default_device_changes_nothing(world: World, W: int, scope: str) -> None:
    for sums in world(W).run(train_with_another_default_device, scope):
        assert sums == pytest.approx([1.0, 1.0, 1.0])
