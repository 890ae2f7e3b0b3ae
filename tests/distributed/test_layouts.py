"""Whatever order a parameter's memory has, the decision is that of the flattened gradients."""

from collections.abc import Callable
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
from helpers.problems import close, flat_grad
from helpers.ranks import World

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.zeros(5, 7),
    "channels_last": lambda: torch.zeros(4, 3, 2, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.zeros(2, 3, 2, 4, 3).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.zeros(9, 6).t(),
    "expanded": lambda: torch.zeros(1, 8).expand(4, 8).clone(),
    "permuted": lambda: torch.zeros(2, 5, 3).permute(2, 0, 1),
    "with gaps": lambda: torch.zeros(6, 8)[:, ::2],
    "0-dim": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0, 3),
    "one": lambda: torch.zeros(1, 1, 1),
}


class Weights(nn.Module):
    """Its micro-gradient is whatever the input says: sum of <p, x> over the parameters."""

    def __init__(self, names: list[str], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(LAYOUTS[n]().to(dtype)) for n in names])

    def forward(self, xs: list[Tensor]) -> Tensor:
        return sum((p * x).sum() for p, x in zip(self.weights, xs, strict=True))  # type: ignore[return-value]


def random_rows(model: Weights, rank: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(rank)
    common = torch.Generator().manual_seed(99)
    return [
        (torch.randn(p.shape, generator=common) + torch.randn(p.shape, generator=rng)).to(p.dtype)
        for p in model.weights
    ]


def rows_of(model: Weights, W: int) -> Tensor:
    return torch.stack(
        [torch.cat([x.double().reshape(-1) for x in random_rows(model, rank)]) for rank in range(W)]
    )


def check_under_ddp(names: list[str], dtype: torch.dtype, scope: str, ddp: dict[str, Any]) -> None:
    W = dist.get_world_size()
    model = Weights(names, dtype)
    wrapped = DistributedDataParallel(model, **ddp)
    optimizer = SGD(model.parameters(), 0.1)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope))
    rows = rows_of(model, W)
    update, right = gaf.aggregate(rows, gaf.GAF(2.0))
    for _ in range(3):  # DDP lays its buckets out anew after the first pass
        optimizer.zero_grad()
        wrapped(random_rows(model, dist.get_rank())).backward()
        assert handle.last is not None
        # The first bucket holds everything; `drawn` already has float32's and bfloat16's own
        # rounding of the rows.
        torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
        close(flat_grad(model), update, rows, 1e-2 if dtype == torch.bfloat16 else 1e-6)
    handle.detach()


ALL = list(LAYOUTS)


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("names", [ALL, *([n] for n in ALL if n != "empty")], ids=str)
def test_ddp(world: World, W: int, names: list[str]) -> None:
    """Two ranks of float32 go the short way, three the general one."""
    world(W).run(check_under_ddp, names, torch.float32, "all", {})


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ddp_in_other_precisions(world: World, W: int, dtype: torch.dtype) -> None:
    world(W).run(check_under_ddp, ALL, dtype, "all", {})


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("scope", ["all", "group"])
@pytest.mark.parametrize("mode", ["gradient_as_bucket_view", "static_graph"])
def test_ddp_in_other_modes(world: World, W: int, scope: str, mode: str) -> None:
    world(W).run(check_under_ddp, ALL, torch.float32, scope, {mode: True})


class Image(nn.Sequential):
    """A convolution as people train it: model and pictures in channels_last."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        self.to(memory_format=torch.channels_last)


def pictures(view: bool) -> None:
    W = dist.get_world_size()
    model = Image()
    rows = []
    for rank in range(W):
        model.zero_grad()
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
        model(x.to(memory_format=torch.channels_last)).pow(2).mean().backward()
        rows.append(flat_grad(model))
        if rank == dist.get_rank():
            mine = x
    model.zero_grad()
    update, right = gaf.aggregate(torch.stack(rows), gaf.GAF(2.0))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    handle = gaf.attach(wrapped, SGD(model.parameters(), 0.1), gaf.GAF(2.0))
    wrapped(mine.to(memory_format=torch.channels_last)).pow(2).mean().backward()
    assert handle.last is not None
    torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
    close(flat_grad(model), update, torch.stack(rows))


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("view", [False, True])
def test_a_convolution_in_channels_last(world: World, W: int, view: bool) -> None:
    world(W).run(pictures, view)


# FSDP2 itself takes no parameter whose memory has another order than its coordinates, no scalar,
# and nothing empty.
SHARDED = ["contiguous", "expanded", "one"]


def check_under_hsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = Weights(SHARDED)
    twin = Weights(SHARDED)
    fully_shard(model, mesh=mesh["shard"])
    handle = gaf.attach(
        model, SGD(model.parameters(), 0.1), gaf.GAF(2.0), group=mesh["replicate"].get_group()
    )
    rows = (
        rows_of(twin, 4).view(2, 2, -1).mean(1)
    )  # a replica's row is the mean of its shards' batches
    _, right = gaf.aggregate(rows, gaf.GAF(2.0))
    model(random_rows(twin, dist.get_rank())).backward()
    assert handle.last is not None
    torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
    handle.detach()


def test_replicas_of_a_sharded_model(world: World) -> None:
    world(4).run(check_under_hsdp)


def check_under_flat_fsdp() -> None:
    W = dist.get_world_size()
    model, twin = Weights(SHARDED), Weights(SHARDED)
    fully_shard(model, mesh=init_device_mesh("cpu", (W,)))
    handle = gaf.attach(model, SGD(model.parameters(), 0.1), gaf.GAF(2.0, scope="group"))
    _, right = gaf.aggregate(rows_of(twin, W), gaf.GAF(2.0))
    model(random_rows(twin, dist.get_rank())).backward()
    assert handle.last is not None
    torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
    handle.detach()


@pytest.mark.parametrize("W", [2, 3])
def test_a_flat_sharded_model(world: World, W: int) -> None:
    world(W).run(check_under_flat_fsdp)


# --------------------------------------------------------------------------------------- one device


@pytest.mark.parametrize("start", ["first", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("names", [ALL, *([n] for n in ALL if n != "empty")], ids=str)
def test_the_accumulator(names: list[str], start: str, dtype: torch.dtype) -> None:
    model = Weights(names, dtype)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0, start=start))
    _, right = gaf.aggregate(rows_of(model, 4), gaf.GAF(2.0, start=start))
    for rank in range(4):
        acc.backward(model(random_rows(model, rank)))
    decision = acc.step()
    torch.testing.assert_close(
        decision.distances, right.distances, rtol=0, atol=5e-3 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("names", [ALL, *([n] for n in ALL if n != "empty")], ids=str)
def test_the_probe(names: list[str]) -> None:
    model = Weights(names)
    batches = [(random_rows(model, i), torch.zeros(1)) for i in range(8)]
    found = gaf.probe(model, lambda output, y: output, batches, k=4, b=1)
    rows = rows_of(model, 8)
    torch.testing.assert_close(found.gram, rows @ rows.T, rtol=1e-5, atol=1e-5)
