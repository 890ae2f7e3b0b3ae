"""gaf.attach under each mode of DDP, against the paper's algorithm on all micro-gradients."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import gaf
from helpers.problems import (
    KINDS,
    Loss,
    Odd,
    Wide,
    close,
    flat_grad,
    micro_gradients,
    plain_loss,
    same,
    same_everywhere,
    telling_tau,
)
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def check(
    W: int,
    make: Callable[[], nn.Module] = Odd,
    loss: Loss = plain_loss,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    tolerance: float = 1e-6,
    micro_group: int = 1,
    compiled: str = "",
    start: str = "first",
    **ddp: Any,
) -> list[str]:
    """Several steps; returns how each ended: a test expects both steps and skips among them."""
    torch.manual_seed(7)
    base = make()
    inner = torch.compile(base, backend="aot_eager") if compiled == "before" else base
    model = DistributedDataParallel(inner, **ddp)
    opt = optimizer(base)
    handle = gaf.attach(model, opt, gaf.GAF(), micro_group=micro_group)
    called = torch.compile(model, backend="aot_eager") if compiled == "after" else model
    went = []
    for step, kind in enumerate(KINDS):
        rows = micro_gradients(base, step, W, loss)
        rows = rows.view(W // micro_group, micro_group, -1).mean(1)
        tau = telling_tau(rows, kind)
        handle.policy = gaf.GAF(tau, start=start)
        update, decision = gaf.aggregate(rows, handle.policy)
        if start == "first":
            expected, accepted = gaf.reference(rows, tau)
            assert accepted == decision.accepted.tolist()
            assert (expected is None) == (not decision.stepped)
        before, state = copy.deepcopy(base.state_dict()), copy.deepcopy(opt.state_dict())
        opt.zero_grad()
        loss(called, step, dist.get_rank()).backward()
        assert handle.last is not None
        assert torch.equal(handle.last.accepted, decision.accepted)
        torch.testing.assert_close(
            handle.last.distances, decision.distances, rtol=0, atol=1e-4, equal_nan=True
        )
        close(flat_grad(base), update, rows, tolerance)
        same_everywhere(
            handle.last.weights,
            handle.last.distances,
            *(p.grad for p in base.parameters() if p.grad is not None),
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        opt.step()
        moved = any(not torch.equal(before[key], value) for key, value in base.state_dict().items())
        assert moved == bool(decision.stepped)
        if not decision.stepped:
            assert same(state, opt.state_dict())
        same_everywhere(*base.parameters())
        went.append("step" if decision.stepped else "skip")
    assert handle.stats()["stepped"] == went.count("step")
    handle.detach()
    return went


def run(world: World, W: int, **options: Any) -> None:
    (went, *others) = world(W).run(partial(check, W, **options))
    assert all(other == went for other in others)
    assert "step" in went
    assert "skip" in went


# ------------------------------------------------------------------------------------- modes of DDP

SMALL_BUCKETS = 0.002  # MiB: several of them


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("make", [Odd, Wide])
@pytest.mark.parametrize("buckets", [25, SMALL_BUCKETS])
def test_the_gradient_after_backward_is_the_papers_update(
    world: World, W: int, make: type, buckets: float
) -> None:
    run(world, W, make=make, bucket_cap_mb=buckets)


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize(
    "mode", ["gradient_as_bucket_view", "static_graph", "find_unused_parameters"]
)
def test_modes(world: World, W: int, mode: str) -> None:
    run(world, W, make=Wide, bucket_cap_mb=SMALL_BUCKETS, **{mode: True})


def rank_dependent_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    from helpers.problems import batch

    x, y = batch(step, rank)
    return nn.functional.cross_entropy(model(x, side=rank % 2 == 0), y)


@pytest.mark.parametrize("view", [False, True])
def test_parameters_that_only_some_ranks_use(world: World, view: bool) -> None:
    run(
        world,
        3,
        loss=rank_dependent_loss,
        find_unused_parameters=True,
        gradient_as_bucket_view=view,
        bucket_cap_mb=SMALL_BUCKETS,
    )


@pytest.mark.parametrize("start", ["best", "worst"])
def test_other_starts(world: World, start: str) -> None:
    world(4).run(partial(check, 4, start=start, make=Wide))


def test_consecutive_ranks_are_averaged_into_rows(world: World) -> None:
    run(world, 4, micro_group=2, make=Wide, tolerance=2e-6)


def one_row(W: int, micro_group: int) -> None:
    model = Odd()
    wrapped = DistributedDataParallel(model)
    opt = sgd(model)
    with pytest.warns(UserWarning, match="one row only"):
        handle = gaf.attach(wrapped, opt, gaf.GAF(0.0), micro_group=micro_group)
    rows = micro_gradients(model, 0, W)
    plain_loss(wrapped, 0, dist.get_rank()).backward()
    close(flat_grad(model), rows.mean(0), rows)
    assert handle.last is not None
    assert handle.last.stepped
    handle.detach()


@pytest.mark.parametrize("W", [1, 2])
def test_one_row_is_plain_training_and_warned_of(world: World, W: int) -> None:
    world(W).run(one_row, W, W)


def partly_frozen() -> nn.Module:
    model = Odd()
    model.first.requires_grad_(False)
    return model


class Mixed(nn.Module):
    """float32 and float64 parameters: buckets of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(13, 300), nn.Linear(300, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).double())


class Checkpointed(Wide):
    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        h = checkpoint(self.layers[:3], x, use_reentrant=False)
        return self.layers[3:](h)


@pytest.mark.parametrize("make", [partly_frozen, Mixed, Checkpointed, partial(Wide, torch.float64)])
def test_models(world: World, make: Callable[[], nn.Module]) -> None:
    run(world, 3, make=make, bucket_cap_mb=SMALL_BUCKETS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(world: World, dtype: torch.dtype) -> None:
    run(world, 3, make=partial(Wide, dtype), tolerance=1e-2)


def autocast_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain_loss(model, step, rank)


def test_autocast(world: World) -> None:
    run(world, 2, make=Wide, loss=autocast_loss)


@pytest.mark.parametrize("compiled", ["before", "after"])
def test_compiled(world: World, compiled: str) -> None:
    run(world, 2, make=Wide, compiled=compiled, tolerance=2e-6)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda m: Adam(m.parameters(), 0.01),
    "foreach": lambda m: AdamW(m.parameters(), 0.01, foreach=True),
    "fused": lambda m: AdamW(m.parameters(), 0.01, fused=True),
    "groups": lambda m: SGD(
        [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(m.parameters())],
        momentum=0.9,
        weight_decay=0.1,
    ),
}


def optimizer_named(name: str, model: nn.Module) -> Optimizer:
    return OPTIMIZERS[name](model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(world: World, name: str) -> None:
    run(world, 2, optimizer=partial(optimizer_named, name))


@pytest.mark.parametrize("W", [2, 3])
def test_a_static_graphs_first_pass_numbers_all_its_buckets_0(world: World, W: int) -> None:
    run(world, W, make=Mixed, static_graph=True)


# ------------------------------------------------------------------------------------- all with all


@pytest.mark.slow
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("make", [Odd, Wide, Mixed, Checkpointed, partly_frozen])
@pytest.mark.parametrize(
    "mode",
    ["gradient_as_bucket_view", "static_graph", "find_unused_parameters", "broadcast_buffers"],
)
@pytest.mark.parametrize("buckets", [25, SMALL_BUCKETS])
def test_every_mode_with_every_model(
    world: World, W: int, make: Callable, mode: str, buckets: float
) -> None:
    run(
        world,
        W,
        make=make,
        optimizer=partial(optimizer_named, "groups"),
        bucket_cap_mb=buckets,
        **{mode: True},
    )
