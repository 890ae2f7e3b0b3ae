"""The loop around gaf.attach: accumulation, scalers, several optimizers, join, faults, what is refused, what it costs."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import gaf
from gaf.ranks import messages
from gaf.ranks.exchange import Exchange
from gaf.ranks.messages import add_in_rank_order
from helpers.problems import (
    KINDS,
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

pytestmark = pytest.mark.distributed
World = Callable[[int], Any]


def attached(
    policy: Any,
    make: Callable[[], nn.Module] = Odd,
    lr: float = 0.05,
    scaler: GradScaler | None = None,
    **ddp: Any,
) -> tuple[DistributedDataParallel, Any, gaf.Handle]:
    torch.manual_seed(3)
    model = DistributedDataParallel(make(), **ddp)
    optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.01)
    return model, optimizer, gaf.attach(model, optimizer, policy, scaler=scaler)


def frozen_copy(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def row_loss(model: nn.Module, row: list[float]) -> Tensor:
    """The micro-gradient of a Vector model is this row."""
    return torch.dot(model(torch.ones(1)), torch.tensor(row))


class Vector(nn.Module):
    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.p * x


# --------------------------------------------------------------------------------------------------------- plain averaging


def mean_is_ddp(dtype: torch.dtype, view: bool) -> None:
    options = {"bucket_cap_mb": 0.002, "gradient_as_bucket_view": view}
    model, optimizer, handle = attached(gaf.Mean(), partial(Wide, dtype), **options)
    torch.manual_seed(3)
    plain = DistributedDataParallel(Wide(dtype), **options)
    other = SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad()
            plain_loss(m, step, dist.get_rank()).backward()
            o.step()
    assert equal(model, frozen_copy(plain))
    stats = handle.stats()
    assert (stats["steps"], stats["stepped"], stats["absent"]) == (4, 4, 0)
    assert handle.last is not None
    assert handle.last.distances.isnan().all()


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_is_plain_ddp_bit_for_bit(world: World, W: int, dtype: torch.dtype) -> None:
    world(W).run(mean_is_ddp, dtype, W == 3)


def random_skip() -> list[bool]:
    model, optimizer, handle = attached(gaf.RandomSkip(0.5, seed=4))
    went = []
    for step in range(8):
        before = frozen_copy(model)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
        assert handle.last is not None
        went.append(bool(handle.last.stepped))
        assert equal(model, before) != went[-1]
    return went


def test_random_skips_fall_alike_on_all_ranks(world: World) -> None:
    first, *others = world(3).run(random_skip)
    assert set(first) == {True, False}
    assert all(other == first for other in others)


# ------------------------------------------------------------------------------------------------- accumulation, clearing


def accumulation(view: bool) -> list[bool]:
    model, optimizer, handle = attached(gaf.GAF(), gradient_as_bucket_view=view)
    rank, W = dist.get_rank(), dist.get_world_size()
    went = []
    for step, kind in enumerate(KINDS):
        rows = torch.stack(
            [micro_gradients(model.module, 10 * step + part, W) for part in range(3)]
        ).sum(0)
        handle.policy = gaf.GAF(telling_tau(rows, kind))
        update, decision = gaf.aggregate(rows, handle.policy)
        before = frozen_copy(model)
        optimizer.zero_grad(set_to_none=step % 2 == 1)
        with model.no_sync():
            plain_loss(model, 10 * step, rank).backward()
            plain_loss(model, 10 * step + 1, rank).backward()
        plain_loss(model, 10 * step + 2, rank).backward()
        assert handle.last is not None
        assert torch.equal(handle.last.accepted, decision.accepted)
        close(flat_grad(model), update, rows)
        optimizer.step()
        assert equal(model, before) != bool(decision.stepped)
        went.append(bool(decision.stepped))
    assert handle.stats()["steps"] == len(KINDS)
    return went


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("W", [2, 3])
def test_gradients_accumulated_without_synchronisation_are_the_row(
    world: World, W: int, view: bool
) -> None:
    for went in world(W).run(accumulation, view):
        assert set(went) == {True, False}


def stale(view: bool) -> None:
    model, optimizer, _ = attached(gaf.GAF(2.0), gradient_as_bucket_view=view)
    plain_loss(model, 0, dist.get_rank()).backward()
    optimizer.step()
    plain_loss(model, 1, dist.get_rank()).backward()
    before = frozen_copy(model)
    with pytest.raises(
        RuntimeError, match="gradients must be cleared before a backward pass that synchronises"
    ):
        optimizer.step()
    assert equal(model, before)
    optimizer.zero_grad()
    plain_loss(model, 2, dist.get_rank()).backward()
    optimizer.step()
    assert not equal(model, before)


@pytest.mark.parametrize("view", [False, True])
def test_accumulating_onto_an_update_is_refused(world: World, view: bool) -> None:
    world(2).run(stale, view)


def late_clearing() -> None:
    model, optimizer, handle = attached(gaf.GAF(2.0))
    for step in range(3):
        loss = plain_loss(model, step, dist.get_rank())
        optimizer.zero_grad(set_to_none=step != 1)
        loss.backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 3


def test_gradients_may_be_cleared_after_the_forward_pass(world: World) -> None:
    world(2).run(late_clearing)


def uneven() -> list[int]:
    model, optimizer, handle = attached(gaf.GAF(2.0))
    rank = dist.get_rank()
    with model.join():
        for step in range(2 + rank):
            optimizer.zero_grad()
            plain_loss(model, step, rank).backward()
            optimizer.step()
    same_everywhere(*model.parameters())
    stats = handle.stats()
    return [stats["steps"], stats["stepped"], *stats["absent_per_row"]]


def test_a_rank_without_data_is_absent(world: World) -> None:
    """3 ranks with 2, 3 and 4 batches: at the third two rows are left, at the fourth one, which is a skip."""
    for told in world(3).run(uneven):
        assert told == [4, 3, 2, 1, 0]


# ----------------------------------------------------------------------------------------------------------------- scaler


def scaled() -> list[Any]:
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model, optimizer, handle = attached(gaf.GAF(0.5), Vector, scaler=scaler)
    twin = Vector()
    other = SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    rank = dist.get_rank()
    agree, against = [1.0, 0.5, 0.0], [-1.0, -0.5, 0.1]
    told = []
    for kind in ("step", "skip", "overflow", "step", "skip"):
        row = {
            "step": agree,
            "skip": against if rank else agree,
            "overflow": [torch.inf, 0.0, 0.0] if rank else agree,
        }[kind]
        before, state = frozen_copy(model), copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        scaler.scale(row_loss(model, row)).backward()
        scaler.unscale_(optimizer)
        if kind == "step":
            other.zero_grad()
            row_loss(twin, agree).backward()
            other.step()
            close(
                flat_grad(model),
                torch.tensor(agree, dtype=torch.float64),
                torch.tensor([agree], dtype=torch.float64),
            )
        scaler.step(optimizer)
        scaler.update()
        assert equal(model, before) == (kind != "step")
        assert equal(model, frozen_copy(twin))
        if kind != "step":
            assert same(optimizer.state_dict(), state)
        told.append(scaler.get_scale())
    assert handle.stats()["stepped"] == 2
    return told


def unscaled() -> None:
    """A scaler that is passed and not used, as in a loop whose autocast is switched off."""
    model, optimizer, handle = attached(gaf.GAF(2.0), scaler=GradScaler("cpu"))
    plain_loss(model, 0, dist.get_rank()).backward()
    before = frozen_copy(model)
    optimizer.step()
    assert not equal(model, before)
    assert handle.stats()["stepped"] == 1


def test_a_scaler_may_stand_by(world: World) -> None:
    world(2).run(unscaled)


def test_an_overflow_on_one_rank_lowers_the_scale_and_steps_nowhere(world: World) -> None:
    """Steps and skips count as good for the scaler: it grows after two of them, and falls at the overflow."""
    for told in world(2).run(scaled):
        assert told == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]


# ------------------------------------------------------------------------------------------- optimizers and schedulers


def two_optimizers() -> None:
    torch.manual_seed(3)
    inner = Odd()
    model = DistributedDataParallel(inner)
    parts = [
        list(inner.first.parameters()),
        [p for n, p in inner.named_parameters() if not n.startswith("first")],
    ]
    optimizers = [SGD(parts[0], 0.1, momentum=0.9), Adam(parts[1], 0.01)]
    handle = gaf.attach(model, optimizers, gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 0.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        before = frozen_copy(model)
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert equal(model, before) == (tau == 0.0)
    same_everywhere(*model.parameters())


def test_several_optimizers_share_one_decision(world: World) -> None:
    world(2).run(two_optimizers)


def sharded_optimizer() -> None:
    torch.manual_seed(3)
    model, twin = DistributedDataParallel(Odd()), Odd()
    twin.load_state_dict(model.module.state_dict())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), Adam, lr=0.01)
    other = Adam(twin.parameters(), 0.01)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 0.0, 2.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if tau == 0.0 or p.grad is None else p.grad.clone()
        optimizer.step()
        other.step()
        assert equal(model, frozen_copy(twin))


def test_zero_redundancy_optimizer(world: World) -> None:
    world(2).run(sharded_optimizer)


def closures() -> None:
    model, optimizer, handle = attached(gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 0.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        before = frozen_copy(model)

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = plain_loss(model, step, dist.get_rank())
            loss.backward()
            return loss

        loss = optimizer.step(closure) if step else optimizer.step(closure=closure)
        assert isinstance(loss, Tensor)
        assert equal(model, before) == (tau == 0.0)


def test_a_closure_that_runs_the_backward_pass_is_filtered_too(world: World) -> None:
    world(2).run(closures)


def gated() -> list[float]:
    model, optimizer, handle = attached(gaf.GAF(2.0), lr=1.0)
    scheduler = handle.gate(LambdaLR(optimizer, lambda t: 0.5**t))
    seen = []
    for step, tau in enumerate((2.0, 0.0, 0.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
    return seen


def test_a_gated_scheduler_stands_still_on_a_skip(world: World) -> None:
    assert world(2).run(gated) == [[0.5, 0.5, 0.5, 0.25]] * 2


# ------------------------------------------------------------------------------------------------------- one rank or many


def ranks_and_accumulator(start: str) -> None:
    W = dist.get_world_size()
    model, optimizer, handle = attached(gaf.GAF(0.9, start=start), Wide)
    twin = copy.deepcopy(model.module)
    other = SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    acc = gaf.Accumulator(other, gaf.GAF(0.9, start=start))
    went = []
    for step, kind in enumerate(KINDS):
        tau = telling_tau(micro_gradients(twin, step, W), kind)
        handle.policy = acc.policy = gaf.GAF(tau, start=start)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
        for rank in range(W):
            acc.backward(plain_loss(twin, step, rank))
        decision = acc.step()
        assert handle.last is not None
        assert torch.equal(handle.last.accepted, decision.accepted)
        went.append(bool(decision.stepped))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert True in went
    assert start == "best" or False in went
    mine, theirs = handle.stats(6), acc.stats(6)
    assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("start", ["first", "best"])
@pytest.mark.parametrize("W", [2, 4])
def test_w_ranks_do_what_one_device_does_with_w_micro_batches(
    world: World, W: int, start: str
) -> None:
    world(W).run(ranks_and_accumulator, start)


def pulled(model: nn.Module, step: int, rank: int) -> Tensor:
    """A loss whose gradients have something in common."""
    return plain_loss(model, step, rank) + 0.1 * sum(p.sum() for p in model.parameters())


def ranks_and_accumulator_that_adapt(kind: str) -> tuple[list[float], list[float], list[float]]:
    """tau of every step under attach, on one device, and in an attach that takes over half-way from the saved state."""
    W = dist.get_world_size()
    kinds = {
        "SignalTau": gaf.SignalTau,
        "NoiseFloorTau": partial(gaf.NoiseFloorTau, 0.3),
        "QuantileTau": gaf.QuantileTau,
        "MovingAverageTau": partial(gaf.MovingAverageTau, cap=2.0),
    }
    model, optimizer, handle = attached(gaf.GAF(kinds[kind]()), Wide)
    twin = copy.deepcopy(model.module)
    acc = gaf.Accumulator(SGD(twin.parameters(), 0.05), gaf.GAF(kinds[kind]()))
    over, alone = [], []
    for step in range(6):
        if step == 3:
            saved = pickle.loads(pickle.dumps(handle.state_dict()))
            handle.detach()
            handle = gaf.attach(model, optimizer, gaf.GAF(kinds[kind]()))
            handle.load_state_dict(saved)
        optimizer.zero_grad()
        pulled(model, step, dist.get_rank()).backward()
        optimizer.step()
        for rank in range(W):
            acc.backward(pulled(twin, step, rank))
        acc.step()
        twin.load_state_dict(model.module.state_dict())  # tau is compared, not how rounding grows
        over.append(handle.stats()["tau"])
        alone.append(acc.stats()["tau"])
    return over, alone, handle.state_dict()["policy"]["tau"]["state"]


@pytest.mark.parametrize("kind", ["SignalTau", "NoiseFloorTau", "QuantileTau", "MovingAverageTau"])
@pytest.mark.parametrize("W", [2, 4])
def test_a_tau_that_adapts_is_the_same_on_all_ranks_and_that_of_one_device(
    world: World, W: int, kind: str
) -> None:
    ranks = world(W).run(ranks_and_accumulator_that_adapt, kind)
    over, alone, state = ranks[0]
    assert all(rank == ranks[0] or rank[::2] == ranks[0][::2] for rank in ranks)  # bit for bit
    assert len(set(over)) > 2
    # Rows are added up in other pieces. With two of them NoiseFloorTau takes a variance over steps: a difference of near numbers.
    assert over == pytest.approx(alone, abs=1e-3 if (kind, W) == ("NoiseFloorTau", 2) else 1e-5)
    assert state


# ----------------------------------------------------------------------------------------------------------------- faults


def faulty(
    row: list[float], policy: Any, at: int
) -> tuple[list[bool], list[float], list[int], list[int]]:
    model, optimizer, handle = attached(policy, Vector)
    good = [[1.0, 0.5, 0.1], [0.9, 0.6, 0.0], [1.1, 0.4, -0.1], [1.0, 0.6, 0.1]][dist.get_rank()]
    optimizer.zero_grad()
    row_loss(model, row if dist.get_rank() == at else good).backward()
    assert model.module.p.grad is not None
    update = model.module.p.grad.tolist()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert handle.last is not None
    stats = handle.stats()
    return handle.last.accepted.tolist(), update, stats["rejected_per_row"], stats["absent_per_row"]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_a_rank_whose_gradient_is_broken_is_left_out_and_counted(
    world: World, value: float, at: int
) -> None:
    row = [0.0, 0.0, 0.0] if value == 0.0 else [value, 1.0, 1.0]
    for accepted, update, rejected, absent in world(4).run(faulty, row, gaf.GAF(0.5), at):
        assert accepted == [i != at for i in range(4)]
        assert all(abs(u) < 2 for u in update)
        assert rejected == [0] * 4
        assert absent == [int(i == at) for i in range(4)]


def test_a_rank_whose_sign_is_flipped_is_rejected_and_counted(world: World) -> None:
    for accepted, _, rejected, _ in world(4).run(faulty, [-1.0, -0.5, -0.1], gaf.GAF(0.5), 3):
        assert accepted == [True, True, True, False]
        assert rejected == [0, 0, 0, 1]


def test_a_huge_row_that_agrees_dominates_unless_norms_are_bounded(world: World) -> None:
    huge = [1e6, 0.5e6, 0.1e6]
    for accepted, update, *_ in world(4).run(faulty, huge, gaf.GAF(0.5), 1):
        assert accepted == [True] * 4
        assert update[0] > 1e5
    for accepted, update, _, absent in world(4).run(
        faulty, huge, gaf.GAF(0.5, max_norm_ratio=10), 1
    ):
        assert accepted == [True, False, True, True]
        assert update[0] < 2
        assert absent == [0, 1, 0, 0]


def test_a_hostile_first_rank_stops_training_unless_other_starts_are_tried(world: World) -> None:
    hostile = [-1.0, -0.5, -0.1]
    for accepted, *_ in world(4).run(faulty, hostile, gaf.GAF(0.5), 0):
        assert accepted == [False] * 4
    for accepted, _, rejected, _ in world(4).run(faulty, hostile, gaf.GAF(0.5, start="best"), 0):
        assert accepted == [False, True, True, True]
        assert rejected == [1, 0, 0, 0]


def majority() -> list[bool]:
    model, _, handle = attached(gaf.GAF(0.5, start="best"), Vector)
    row_loss(model, [1.0, 0.5, 0.1] if dist.get_rank() == 0 else [-1.0, -0.5, -0.1]).backward()
    assert handle.last is not None
    return handle.last.accepted.tolist()


def test_a_hostile_majority_that_agrees_wins(world: World) -> None:
    """No rule that looks at agreement alone can tell it from an honest one."""
    assert world(4).run(majority) == [[False, True, True, True]] * 4


# ---------------------------------------------------------------------------------------------------------------- refusals


def sync_batch_norm() -> tuple[Any, Any]:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    optimizer = SGD(model.parameters(), 0.1)
    norm = nn.SyncBatchNorm(4)  # DDP itself takes it on a GPU only
    norm.weight, norm.bias = model.module[1].weight, model.module[1].bias
    model.module[1] = norm
    return model, optimizer


def outside_optimizer() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    return model, SGD(model.module.first.parameters(), 0.1)


def other_hook() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model.register_comm_hook(None, allreduce_hook)
    return model, SGD(model.parameters(), 0.1)


def twice() -> tuple[Any, Any]:
    model, optimizer, _ = attached(gaf.GAF())
    return model, optimizer


def in_backward() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    for p in model.parameters():
        p._in_backward_optimizers = []  # what apply_optimizer_in_backward leaves
    return model, SGD(model.parameters(), 0.1)


def wrapped(make: Callable[[], nn.Module], **ddp: Any) -> tuple[Any, Any]:
    model = DistributedDataParallel(make(), **ddp)
    return model, SGD(model.parameters(), 0.1)


def overlapping() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
    optimizer._overlap_with_ddp = True
    return model, optimizer


def needs_closure() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    return model, torch.optim.LBFGS(model.parameters())


def bare() -> tuple[Any, Any]:
    model = Odd()
    return model, SGD(model.parameters(), 0.1)


def python_reducer() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    model._use_python_reducer = True
    return model, SGD(model.parameters(), 0.1)


def mixed_precision() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    model.mixed_precision = object()
    return model, SGD(model.parameters(), 0.1)


REFUSALS: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any], str]] = {
    "bare": (bare, {}, "must be data parallel.*got Odd.*gaf.Accumulator"),
    "outside": (outside_optimizer, {}, "must hold every trainable parameter.*'module.scale'"),
    "hook": (other_hook, {}, "no other communication hook; it has allreduce_hook"),
    "twice": (twice, {}, "attached already"),
    "in backward": (in_backward, {}, "must step after the backward pass"),
    "sync batch norm": (sync_batch_norm, {}, "SyncBatchNorm 'module.1' mixes"),
    "sparse": (
        partial(wrapped, partial(nn.Embedding, 5, 3, sparse=True)),
        {},
        "must be dense; 'module' is sparse",
    ),
    "complex": (
        partial(wrapped, partial(nn.Linear, 3, 3, dtype=torch.complex64)),
        {},
        "must be real",
    ),
    "overlap": (overlapping, {}, "overlap_with_ddp=False"),
    "python reducer": (python_reducer, {}, "Python reducer"),
    "mixed precision": (mixed_precision, {}, "Use torch.autocast"),
    "micro group": (
        partial(wrapped, Odd),
        {"micro_group": 3},
        r"divides the 2 ranks; got 3. Use one of \[1, 2\]",
    ),
    "policy": (partial(wrapped, Odd), {"policy": gaf.GAF}, "attach: policy must be a callable"),
    "too many": (
        partial(wrapped, Odd),
        {"policy": gaf.GAF(min_accepted=3)},
        "must be at most the number of rows.*got 3 and 2 rows",
    ),
    "closure": (needs_closure, {}, "attach: the optimizer must not need a closure; LBFGS"),
    "group": (partial(wrapped, Odd), {"group": "another"}, "must be the model's own process group"),
}


def refused(name: str) -> None:
    make, options, message = REFUSALS[name]
    model, optimizer = make()
    options = options | ({"group": dist.new_group([0, 1])} if "group" in options else {})
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        gaf.attach(model, optimizer, **({"policy": gaf.GAF()} | options))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_with_the_way_out(world: World, name: str) -> None:
    world(2).run(refused, name)


def disagreement(what: str) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(Odd())
    if what == "parameters" and rank == 1:
        model.module.first.weight.requires_grad_(False)
    optimizer = SGD(model.parameters(), 0.1)
    policy = gaf.GAF(0.9 if what == "policy" and rank == 2 else 0.8)
    micro_group = 2 if what == "micro_group" and rank == 0 else 1
    expected = {
        "micro_group": "same micro_group; rank 0 of the group has 2, others 1",
        "policy": r"same policy; rank 2 of the group has GAF\(tau=0.9",
        "parameters": "same parameters; rank 1 .*trainable=False",
    }
    with pytest.raises(ValueError, match=expected[what]):
        gaf.attach(model, optimizer, policy, micro_group=micro_group)


@pytest.mark.parametrize("what", ["policy", "parameters", "micro_group"])
def test_ranks_that_disagree_are_told_which(world: World, what: str) -> None:
    world(3).run(disagreement, what)


# ------------------------------------------------------------------------------------------------- detach, state, groups


def detached() -> None:
    model, optimizer, handle = attached(gaf.GAF(0.0))
    plain_loss(model, 0, dist.get_rank()).backward()
    assert handle.last is not None
    assert not handle.last.stepped
    optimizer.step()
    handle.detach()
    W = dist.get_world_size()
    for policy in (None, gaf.GAF(0.0), None):
        if policy is not None:
            handle = gaf.attach(model, optimizer, policy)
        rows = micro_gradients(model.module, 1, W)
        optimizer.zero_grad()
        plain_loss(model, 1, dist.get_rank()).backward()
        close(flat_grad(model), rows.mean(0) if policy is None else 0 * rows[0], rows)
        before = frozen_copy(model)
        optimizer.step()
        assert equal(model, before) == (policy is not None)
        handle.detach()


def test_detach_leaves_plain_averaging_and_attaching_again_filters(world: World) -> None:
    world(2).run(detached)


def state() -> None:
    model, optimizer, handle = attached(gaf.RandomSkip(0.5))
    for step in range(3):
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
    saved = pickle.loads(pickle.dumps(handle.state_dict()))
    handle.detach()
    again = gaf.attach(model, optimizer, gaf.RandomSkip(0.5))
    again.load_state_dict(saved)
    assert again.stats()["steps"] == 3
    assert again.policy.step == 3
    same_everywhere(torch.tensor([float(again.stats()["stepped"])]))


def test_state_is_saved_and_taken_back(world: World) -> None:
    world(2).run(state)


def bucketwise() -> tuple[int, int]:
    """Each bucket's parameters get what the algorithm gives on their coordinates alone."""
    W, rank = dist.get_world_size(), dist.get_rank()
    model, optimizer, handle = attached(gaf.GAF(1.1, scope="group"), Wide, bucket_cap_mb=0.002)
    moved = stood = 0
    seen: list[list[Tensor]] = []
    settle = handle.settle

    def listening(exchange: Any, params: Any, over: Any) -> None:
        seen.append(list(params))
        settle(exchange, params, over)

    handle.settle = listening  # type: ignore[method-assign]
    for step in range(4):
        seen.clear()
        rows = []
        for r in range(W):
            twin = copy.deepcopy(model.module)
            rows.append(
                dict(
                    zip(
                        model.parameters(),
                        torch.autograd.grad(plain_loss(twin, step, r), list(twin.parameters())),
                        strict=True,
                    )
                )
            )
        before = frozen_copy(model)
        optimizer.zero_grad()
        plain_loss(model, step, rank).backward()
        assert len(seen) == 1 or step > 0  # DDP builds its buckets after the first pass
        stepped = {}
        for params in seen:
            matrix = torch.stack([torch.cat([row[p].reshape(-1) for p in params]) for row in rows])
            update, decision = gaf.aggregate(matrix, gaf.GAF(1.1))
            torch.testing.assert_close(
                torch.cat([p.grad.reshape(-1) for p in params]), update, rtol=1e-5, atol=1e-7
            )
            stepped |= dict.fromkeys(params, bool(decision.stepped))
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, q) != stepped[p]
            moved, stood = moved + stepped[p], stood + (not stepped[p])
    assert len(seen) > 1
    assert handle.stats()["steps"] == 1 + 3 * len(seen)
    return moved, stood


def test_scope_group_decides_bucket_by_bucket(world: World) -> None:
    for moved, stood in world(2).run(bucketwise):
        assert moved > 0
        assert stood > 0


# ------------------------------------------------------------------------------------------------------------ what it costs


def cost(micro_group: int) -> dict[str, float]:
    """Coordinates that this rank hands to each collective, counted where they are called, over one step."""
    model, _, _ = attached(gaf.GAF(2.0), Wide, bucket_cap_mb=0.05)
    hook = model._comm_hooks[0][0].__self__
    hook.handle.detach()
    handle = gaf.attach(model, SGD(model.parameters(), 0.1), gaf.GAF(2.0), micro_group=micro_group)
    W = dist.get_world_size()
    plain_loss(model, 0, dist.get_rank()).backward()  # buckets are built anew after the first
    model.zero_grad()
    sent = {"gradient": 0.0, "scalars": 0.0}

    def count(tensor: Tensor, share: float) -> None:
        sent["scalars" if tensor.dtype == torch.float64 else "gradient"] += tensor.numel() * share

    def counted(name: str, share: float) -> Callable[..., Any]:
        real = getattr(messages if name == "_all_gather" else dist, name)

        def call(*tensors: Tensor, **options: Any) -> Any:
            count(tensors[-1], share)
            return real(*tensors, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted("all_reduce", 2 * (W - 1) / W))
        patch.setattr(dist, "all_to_all_single", counted("all_to_all_single", (W - 1) / W))
        patch.setattr(dist, "isend", counted("isend", 1))
        patch.setattr(messages, "_all_gather", counted("_all_gather", W - 1))
        plain_loss(model, 1, dist.get_rank()).backward()
    n = sum(p.numel() for p in model.parameters())
    held = sum(t.numel() for t in hook.way.exchange._spare.flats)  # the pair keeps p.grad instead
    handle.detach()
    return {
        "gradient": sent["gradient"] / (2 * n * (W - 1) / W),
        "scalars": sent["scalars"],
        "held": held / n,
    }


@pytest.mark.parametrize(("W", "micro_group"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_a_step_sends_what_one_all_reduce_sends_and_holds_one_gradient_more(
    world: World, W: int, micro_group: int
) -> None:
    for told in world(W).run(cost, micro_group):
        assert 0.99 <= told["gradient"] <= 1.01
        k = W // micro_group
        # K, the scale, and whether an update was still there
        assert told["scalars"] == (W - 1) * (k * k + 2)
        assert 0.99 * (W > 2) <= told["held"] <= 1.01 * (W > 2)


def many_ranks() -> None:
    """The way of more than 32 ranks, taken by few."""
    partial_sum = torch.randn(11, dtype=torch.float64) * 10.0 ** torch.arange(-5, 6)
    partial_sum = partial_sum * (dist.get_rank() + 1)
    few = add_in_rank_order(partial_sum, dist.group.WORLD)
    saved, messages.FEW = messages.FEW, 1
    many = add_in_rank_order(partial_sum, dist.group.WORLD)
    messages.FEW = saved
    assert torch.equal(few, many)
    same_everywhere(few)


@pytest.mark.parametrize("W", [2, 3, 4])
def test_beyond_32_ranks_partial_sums_are_added_in_blocks_to_the_same_bits(
    world: World, W: int
) -> None:
    world(W).run(many_ranks)


def slices(sizes: list[int], dtype: torch.dtype) -> None:
    """Pieces of any size, empty ones too, come back as the weighted sum."""
    W, rank = dist.get_world_size(), dist.get_rank()
    rng = torch.Generator().manual_seed(0)
    rows = [[torch.randn(size, generator=rng).to(dtype) for size in sizes] for _ in range(W)]
    mine = [piece.clone() for piece in rows[rank]]
    way = Exchange(dist.group.WORLD)
    for _ in range(2):  # the second time in the memory of the first
        for piece, original in zip(mine, rows[rank], strict=True):
            piece.copy_(original)
            way.send(piece)
        way.receive()
        total = add_in_rank_order(way.partial_gram().reshape(-1), way.group).view(W, W)
        matrix = torch.stack([torch.cat(row).double() for row in rows])
        torch.testing.assert_close(total, matrix @ matrix.T, rtol=1e-5, atol=1e-5)
        weights = [0.0, *[1 / (W - 1)] * (W - 1)]
        way.give_back(weights)
        way.end()
        torch.testing.assert_close(
            torch.cat(mine).double(),
            matrix[1:].mean(0),
            rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
            atol=1e-2,
        )


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[1], [3, 0, 2], [2**14 + 1, 5, 2**15 - 1]])
def test_pieces_of_any_size_come_back(
    world: World, W: int, sizes: list[int], dtype: torch.dtype
) -> None:
    world(W).run(slices, sizes, dtype)


# -------------------------------------------------------------------------------------------------- two ranks, the short way


def way_of(model: DistributedDataParallel) -> str:
    way = model._comm_hooks[0][0].__self__.way
    return " by ".join(
        [type(way).__name__, *([type(way.exchange).__name__] if hasattr(way, "exchange") else [])]
    )


def short_way(scale: float) -> None:
    """Rows of very different length, nearly at right angles: the cosine comes from the shorter one."""
    torch.manual_seed(0)
    n = 5000
    a, b = torch.randn(2, n)
    b = (b - a * (a @ b) / (a @ a) + 0.04 * a) / scale
    model, _, handle = attached(gaf.GAF(1.0), partial(Vector, n))
    torch.dot(model(torch.ones(1)), [a, b][dist.get_rank()]).backward()
    assert way_of(model) == "OneDecision by Pair"
    exact = 1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    assert handle.last is not None
    assert handle.last.distances[1].item() == pytest.approx(exact.item(), abs=1e-6)
    close(flat_grad(model), (a.double() + b.double()) / 2, torch.stack([a, b]).double())


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3, 1e6])
def test_two_ranks_of_different_norm_are_compared_exactly(world: World, scale: float) -> None:
    world(2).run(short_way, scale)


def ways() -> list[str]:
    """The policy may be another at each step; each goes its own way and gives its own update."""
    model, optimizer, handle = attached(gaf.GAF(0.9), Wide)
    told = []
    policies = [
        gaf.GAF(2.0, average="halving"),
        gaf.Mean(),
        gaf.GAF(2.0, min_accepted=1),
        gaf.GAF(2.0, scope="group"),
        gaf.GAF(2.0, start="worst"),
    ]
    for step, policy in enumerate(policies):
        handle.policy = policy
        rows = micro_gradients(model.module, step, 2)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        close(flat_grad(model), rows.mean(0), rows)
        optimizer.step()
        told.append(way_of(model))
    return told


def test_the_policy_may_change_between_steps(world: World) -> None:
    for told in world(2).run(ways):
        pair, general = "OneDecision by Pair", "OneDecision by Exchange"
        assert told == [pair, "PlainAverage", general, "DecisionPerBucket", pair]
