"""Accumulation without synchronisation, clearing, and loss scaling around gaf.attach."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.amp import GradScaler
from torch.optim import SGD

import gaf
from helpers.attached import Vector, attach_model, equal, row_loss, values
from helpers.problems import (
    KINDS,
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


# --------------------------------------------------------------------------- accumulation, clearing


def accumulate(view: bool) -> list[bool]:
    model, optimizer, handle = attach_model(gaf.GAF(), gradient_as_bucket_view=view)
    rank, W = dist.get_rank(), dist.get_world_size()
    went = []
    for step, kind in enumerate(KINDS):
        rows = torch.stack(
            [micro_gradients(model.module, 10 * step + part, W) for part in range(3)]
        ).sum(0)
        handle.policy = gaf.GAF(telling_tau(rows, kind))
        update, decision = gaf.aggregate(rows, handle.policy)
        before = values(model)
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
    for went in world(W).run(accumulate, view):
        assert set(went) == {True, False}


def accumulate_onto_an_update(view: bool) -> None:
    model, optimizer, _ = attach_model(gaf.GAF(2.0), gradient_as_bucket_view=view)
    plain_loss(model, 0, dist.get_rank()).backward()
    optimizer.step()
    plain_loss(model, 1, dist.get_rank()).backward()
    before = values(model)
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
    world(2).run(accumulate_onto_an_update, view)


def clear_late() -> None:
    model, optimizer, handle = attach_model(gaf.GAF(2.0))
    for step in range(3):
        loss = plain_loss(model, step, dist.get_rank())
        optimizer.zero_grad(set_to_none=step != 1)
        loss.backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 3


def test_gradients_may_be_cleared_after_the_forward_pass(world: World) -> None:
    world(2).run(clear_late)


def run_out_of_data() -> list[int]:
    model, optimizer, handle = attach_model(gaf.GAF(2.0))
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
    """3 ranks with 2, 3 and 4 batches: the third step has two rows; the fourth has one: a skip."""
    for told in world(3).run(run_out_of_data):
        assert told == [4, 3, 2, 1, 0]


# ------------------------------------------------------------------------------------------- scaler


def scale_losses() -> list[Any]:
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model, optimizer, handle = attach_model(gaf.GAF(0.5), Vector, scaler=scaler)
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
        before, state = values(model), copy.deepcopy(optimizer.state_dict())
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
        assert equal(model, values(twin))
        if kind != "step":
            assert same(optimizer.state_dict(), state)
        told.append(scaler.get_scale())
    assert handle.stats()["stepped"] == 2
    return told


def keep_a_scaler_idle() -> None:
    """A scaler that is passed and not used, as in a loop whose autocast is switched off."""
    model, optimizer, handle = attach_model(gaf.GAF(2.0), scaler=GradScaler("cpu"))
    plain_loss(model, 0, dist.get_rank()).backward()
    before = values(model)
    optimizer.step()
    assert not equal(model, before)
    assert handle.stats()["stepped"] == 1


def test_a_scaler_may_stand_by(world: World) -> None:
    world(2).run(keep_a_scaler_idle)


def test_an_overflow_on_one_rank_lowers_the_scale_and_steps_nowhere(world: World) -> None:
    """Steps and skips both let the scale grow, after two of them; it falls at the overflow."""
    for told in world(2).run(scale_losses):
        assert told == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
