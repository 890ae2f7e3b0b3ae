"""Ways from the replicas' gradients to one update under HSDP: FSDP2's own, gaf's, gathering all."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import gaf
from gaf.ranks import way_in
from gaf_lab.bench.timing import StepFunction
from gaf_lab.bench.ways import CLASSES, TAU, build_model, gather_all
from gaf_lab.settings.choices import ModelName
from gaf_lab.training import models

HSDP, GATHER = "plain HSDP", "gather replicas"
LATE = "gaf.GAF, sent late"
FILTERS: dict[str, Callable[[], Any]] = {
    "gaf.GAF": lambda: gaf.GAF(TAU),
    LATE: lambda: gaf.GAF(TAU),
    "gaf.Mean": gaf.Mean,
}
HSDP_WAYS = (HSDP, *FILTERS, GATHER)
SMALLEST = 2**14  # coordinates of a layer that is a parameter group of its own


@dataclasses.dataclass(frozen=True)
class HSDPSetup:
    """The same on every rank. peak: the way whose peak of memory is measured, instead of times."""

    model: ModelName = "resnet18"
    stem: models.Stem = "imagenet"
    b: int = 32
    replicas: int = 2
    shards: int = 2
    rounds: int = 20
    peak: str | None = None


def make_mesh(setup: HSDPSetup) -> DeviceMesh:
    shape = (setup.replicas, setup.shards)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def make_sharded(setup: HSDPSetup, mesh: DeviceMesh) -> Any:
    """The model, each of its larger layers a parameter group."""
    model: Any = build_model(setup.model, setup.stem)
    for layer in model.children():
        if sum(p.numel() for p in layer.parameters()) >= SMALLEST:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_sharded_step(way: str, setup: HSDPSetup, mesh: DeviceMesh) -> tuple[StepFunction, Any]:
    """A training step of a fresh model on this rank, and that model."""
    model = make_sharded(setup, mesh if way == HSDP else mesh["shard"])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    rng = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(setup.b, 3, 32, 32, generator=rng)
    y = torch.randint(0, CLASSES, (setup.b,), generator=rng)
    if way in FILTERS:
        gaf.attach(model, optimizer, FILTERS[way](), group=mesh["replicate"])

    def step() -> None:
        with sending_late() if way == LATE else nullcontext():
            nn.functional.cross_entropy(model(x), y).backward()
        if way == GATHER:
            gather_replicas(list(model.parameters()), mesh)
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def sending_late() -> AbstractContextManager[Any]:
    """Nothing is sent before the backward pass is over, as for gradients on the host."""
    return mock.patch.object(way_in, "is_offloaded", return_value=True)


def gather_replicas(params: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Every rank receives its shard of every replica's gradient, and filters for itself."""
    grads = [local_grad(p) for p in params]
    rows = torch.stack(gather_all(torch.cat(grads), mesh["replicate"].get_group()))
    gram = gaf.gram(rows)
    dist.all_reduce(gram, group=mesh["shard"].get_group())
    update = gaf.GAF(TAU)(gram).weights.to(rows.dtype) @ rows
    for grad, part in zip(grads, update.split([len(g) for g in grads]), strict=True):
        grad.copy_(part)


def local_grad(p: Any) -> Tensor:
    flat: Tensor = p.grad.to_local().view(-1)
    return flat
