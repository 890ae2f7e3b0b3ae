"""gaf.Guard under gaf.attach: plain DDP bit for bit, and without the ranks that are broken."""

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import attach_model, equal, values
from helpers.plain_ddp import (
    MODES,
    SMALL_BUCKETS,
    compare_in_all_modes,
    compare_in_many_modes,
)
from helpers.problems import Odd, Wide, micro_gradients, plain_loss, same_everywhere
from helpers.ranks import World

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:gaf:UserWarning"),
]


@pytest.mark.parametrize("W", [2, 3, 4])
def test_without_a_fault_it_is_plain_ddp_bit_for_bit(world: World, W: int) -> None:
    world(W).run(compare_in_many_modes, gaf.Guard())


@pytest.mark.slow
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_plain_ddps_bit_for_bit(world: World, W: int, mode: str) -> None:
    world(W).run(compare_in_all_modes, gaf.Guard(), mode)


# ------------------------------------------------------------------------------------ a broken rank


def poisoned(model: nn.Module, step: int, rank: int, bad: int, value: float) -> Tensor:
    loss = plain_loss(model, step, rank)
    return loss * value if rank == bad else loss


def twin_of_the_others(model: Any, step: int, ranks: list[int]) -> None:
    """The gradient that plain DDP of these ranks alone gives: in one process, multiplied first."""
    rows = []
    for rank in ranks:
        model.zero_grad()
        plain_loss(model, step, rank).backward()
        rows.append([p.grad / len(ranks) for p in model.parameters()])
    for p, *parts in zip(model.parameters(), *rows, strict=True):
        p.grad = sum(parts[1:], parts[0])


def train_with_a_rank_that_sends_nan(dtype: torch.dtype, **ddp: Any) -> list[dict[str, Any]]:
    """Rank 1 sends NaN for ever; the two others' average has the same bits in any order."""
    rank, heard = dist.get_rank(), []
    policy = gaf.Guard(on_alarm=heard.append if rank == 2 else None)
    model, optimizer, handle = attach_model(policy, partial(Wide, dtype), **ddp)
    torch.manual_seed(3)
    twin = Wide(dtype)
    other = SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(26):  # from the 20th on most of them without cosines
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            poisoned(model, step, rank, 1, math.nan).backward()
        texts = [str(one.message) for one in told if "gaf" in str(one.message)]
        assert len(texts) == (step == 0)
        assert all("rank 1 (host" in text and "not finite at step 1" in text for text in texts)
        optimizer.step()
        twin_of_the_others(twin, step, [0, 2])
        other.step()
        assert equal(model, values(twin)), f"step {step}"
    first, second, third = handle.workers()
    assert [w["left_out"] for w in (first, second, third)] == [0, 26, 0]
    assert [w["finite"] for w in (first, second, third)] == [1, 0, 1]
    assert math.isnan(second["norm"])
    stats = handle.stats()
    assert stats["absent_per_row"] == [0, 26, 0]
    assert (stats["accepted"], stats["absent"], stats["rejected"]) == (52, 26, 0)
    assert (stats["stepped"], stats["acceptance"]) == (26, pytest.approx(math.nan, nan_ok=True))
    assert len(heard) == (rank == 2)
    (alarm,) = handle.alarms
    assert (alarm["step"], alarm["rank"], alarm["kind"]) == (1, 1, "not finite")
    assert (alarm["count"], alarm["last_step"]) == (26, 26)
    return handle.alarms


def test_a_rank_that_sends_nan_for_ever_leaves_the_training_of_the_others(world: World) -> None:
    """Exactly, from kept gradients and from copies."""
    for dtype, ddp in (
        (torch.float32, {}),
        (torch.float32, {"bucket_cap_mb": SMALL_BUCKETS, "gradient_as_bucket_view": True}),
        (torch.bfloat16, {"bucket_cap_mb": SMALL_BUCKETS}),
    ):
        first, *others = world(3).run(partial(train_with_a_rank_that_sends_nan, dtype, **ddp))
        assert all(other == first for other in others)


def go_through_faults() -> list[Any]:
    """Left out: a NaN, an infinity, a thousandfold row. A skip where half are broken."""
    policy = gaf.Guard(drift=None)  # suspects no one
    model, optimizer, handle = attach_model(policy, Odd, find_unused_parameters=True)
    rank, W = dist.get_rank(), dist.get_world_size()
    skipped = (36, 38)
    for step in range(40):
        faults = {30: {1: math.nan}, 32: {0: math.inf}, 34: {2: 1e4}, 36: {0: math.nan, 3: 1e8}}
        faults[38] = {0: math.nan, 1: math.nan}
        now = faults.get(step, {})
        rows = micro_gradients(model.module, step, W)
        optimizer.zero_grad()
        (plain_loss(model, step, rank) * now.get(rank, 1.0)).backward()
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        before = values(model)
        optimizer.step()
        assert handle.last is not None
        assert handle.outcome is not None
        assert math.isnan(handle.outcome.signal) == (bool(now) or (step >= 20 and step % 4 > 0))
        if not now:
            norms2 = rows.square().sum(1).tolist()
            assert handle.outcome.norms2 == pytest.approx(norms2, rel=1e-5)
        kept = [r for r in range(W) if r not in now]
        assert handle.last.accepted.tolist() == [
            r in kept and step not in skipped for r in range(W)
        ]
        if step in skipped:
            assert equal(model, before)
            assert not grads.any()
        else:
            expected = rows[kept].mean(0)
            assert (grads - expected).norm() < 1e-5 * rows.norm(dim=1).max()
    same_everywhere(*model.parameters())
    found = [(a["step"], a["rank"], a["kind"]) for a in handle.alarms]
    assert found == [
        *((31, 1, "not finite"), (33, 0, "not finite"), (35, 2, "norm")),
        (37, 3, "norm"),
    ]
    assert [a["count"] for a in handle.alarms] == [2, 3, 1, 1]
    assert [w["left_out"] for w in handle.workers()] == [1, 1, 1, 0]
    assert handle.stats()["stepped"] == 38
    return handle.alarms


def test_broken_rows_are_left_out_and_named(world: World) -> None:
    first, *others = world(4).run(go_through_faults)
    assert all(other == first for other in others)


def guard_groups() -> None:
    """micro_group: the rows are averages, which K shows."""
    model = DistributedDataParallel(Wide())
    optimizer = SGD(model.parameters(), 0.05)
    policy = gaf.Guard()
    handle = gaf.attach(model, optimizer, policy, micro_group=1)
    handle.detach()
    handle = gaf.attach(model, optimizer, policy, micro_group=2)
    rank = dist.get_rank()
    for bad in (None, 3):
        rows = micro_gradients(model.module, 0, 4)
        optimizer.zero_grad()
        (plain_loss(model, 0, rank) * (math.nan if rank == bad else 1)).backward()
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        expected = rows.mean(0) if bad is None else torch.zeros_like(grads)  # half are broken
        assert (grads - expected).norm() <= 1e-6 * rows.norm(dim=1).max()
        optimizer.step()
    (alarm,) = handle.alarms
    assert (alarm["rank"], alarm["ranks"], alarm["step"]) == (2, [2, 3], 2)


def test_groups_of_ranks_are_guarded_by_k(world: World) -> None:
    world(4).run(guard_groups)


# ------------------------------------------------------------------------------ state, scaler, join


def interrupt(at: int | None) -> tuple[nn.Module, gaf.Handle]:
    """A run of 30 steps that is saved and gone on with before step `at`."""
    model, optimizer, handle = attach_model(gaf.Guard())
    rank = dist.get_rank()
    for step in range(30):
        if step == at:
            state = handle.state_dict()
            handle.detach()
            handle = gaf.attach(model, optimizer, gaf.Guard())
            handle.load_state_dict(state)
        optimizer.zero_grad()
        if step % 5 == 0:  # a pass that no step follows is forgotten
            plain_loss(model, 100 + step, rank).backward()
            optimizer.zero_grad()
        (plain_loss(model, step, rank) * (50.0 if (step, rank) == (27, 1) else 1.0)).backward()
        optimizer.step()
    return model, handle


def go_on() -> None:
    whole, handle = interrupt(None)
    again, restored = interrupt(23)
    assert equal(whole, values(again))
    assert handle.workers()[1]["left_out"] == 1
    assert repr(handle.state_dict()) == repr(restored.state_dict())
    assert [a["step"] for a in handle.alarms] == [a["step"] for a in restored.alarms] == [28]


def test_a_run_that_goes_on_guards_as_before(world: World) -> None:
    world(3).run(go_on)


def scale(bad: list[int]) -> tuple[float, list[int], int]:
    """Steps 0 to 2; in step 1 these ranks overflow."""
    scaler = GradScaler("cpu", init_scale=1024.0)
    model, optimizer, handle = attach_model(gaf.Guard(), scaler=scaler)
    rank = dist.get_rank()
    for step in range(3):
        optimizer.zero_grad()
        loss = plain_loss(model, step, rank)
        if step == 1 and rank in bad:
            loss = loss * math.inf
        before = values(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert equal(model, before) == (step == 1 and len(bad) > 1)
    out = [worker["left_out"] for worker in handle.workers()]
    return scaler.get_scale(), out, len(handle.alarms)


def test_the_scale_falls_where_half_of_the_ranks_overflow(world: World) -> None:
    """One rank alone is broken; the scale is not to blame."""
    assert set(map(repr, world(3).run(scale, [1]))) == {repr((1024.0, [0, 1, 0], 1))}
    assert set(map(repr, world(3).run(scale, [0, 1]))) == {repr((512.0, [0, 0, 0], 0))}


def run_out_of_data(initial: bool) -> None:
    """Rank 0 has 2 batches, the others 4; in the last step rank 1 is broken."""
    rank, W = dist.get_rank(), dist.get_world_size()
    model = Wide()
    torch.manual_seed(3)
    wrapped = DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), 0.0)
    handle = gaf.attach(wrapped, optimizer, gaf.Guard())
    with wrapped.join(divide_by_initial_world_size=initial):
        for step in range(2 if rank == 0 else 4):
            optimizer.zero_grad()
            (
                plain_loss(wrapped, step, rank) * (math.nan if (step, rank) == (3, 1) else 1)
            ).backward()
            rows = micro_gradients(model, step, W)
            if step >= 2:
                kept = rows[[2, 3]] if step == 3 else rows[1:]
                count = len(kept) + initial  # the zeros of rank 0 count under DDP's default
                grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
                error = (grads - kept.sum(0) / count).norm()
                assert error < 1e-6 * rows.norm(dim=1).max()
            optimizer.step()
    assert handle.stats()["absent_per_row"] == [2, 1, 0, 0]
    assert [worker["left_out"] for worker in handle.workers()] == [0, 1, 0, 0]


@pytest.mark.parametrize("initial", [True, False])
def test_ranks_without_data_are_not_broken(world: World, initial: bool) -> None:
    world(4).run(run_out_of_data, initial)


def mix() -> None:
    """As under GAF: an optimizer must not step on an update to which gradients were added."""
    model, optimizer, _ = attach_model(gaf.Guard())
    for step in range(2):
        plain_loss(model, step, dist.get_rank()).backward()
        if step == 0:
            optimizer.step()
    with pytest.raises(RuntimeError, match="gradients must be cleared before a backward pass"):
        optimizer.step()


def test_adding_to_an_update_is_refused(world: World) -> None:
    world(2).run(mix)
