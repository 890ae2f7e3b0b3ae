"""A rank whose gradients are broken, flipped, huge or hostile."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

import gaf
from helpers.attached import Vector, attach_model, row_loss
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def train_with_a_fault(
    row: list[float], policy: Any, at: int
) -> tuple[list[bool], list[float], list[int], list[int]]:
    model, optimizer, handle = attach_model(policy, Vector)
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
    for accepted, update, rejected, absent in world(4).run(
        train_with_a_fault, row, gaf.GAF(0.5), at
    ):
        assert accepted == [i != at for i in range(4)]
        assert all(abs(u) < 2 for u in update)
        assert rejected == [0] * 4
        assert absent == [int(i == at) for i in range(4)]


def test_a_rank_whose_sign_is_flipped_is_rejected_and_counted(world: World) -> None:
    for accepted, _, rejected, _ in world(4).run(
        train_with_a_fault, [-1.0, -0.5, -0.1], gaf.GAF(0.5), 3
    ):
        assert accepted == [True, True, True, False]
        assert rejected == [0, 0, 0, 1]


def test_a_huge_row_that_agrees_dominates_unless_norms_are_bounded(world: World) -> None:
    huge = [1e6, 0.5e6, 0.1e6]
    for accepted, update, *_ in world(4).run(train_with_a_fault, huge, gaf.GAF(0.5), 1):
        assert accepted == [True] * 4
        assert update[0] > 1e5
    for accepted, update, _, absent in world(4).run(
        train_with_a_fault, huge, gaf.GAF(0.5, max_norm_ratio=10), 1
    ):
        assert accepted == [True, False, True, True]
        assert update[0] < 2
        assert absent == [0, 1, 0, 0]


def test_a_hostile_first_rank_stops_training_unless_other_starts_are_tried(world: World) -> None:
    hostile = [-1.0, -0.5, -0.1]
    for accepted, *_ in world(4).run(train_with_a_fault, hostile, gaf.GAF(0.5), 0):
        assert accepted == [False] * 4
    for accepted, _, rejected, _ in world(4).run(
        train_with_a_fault, hostile, gaf.GAF(0.5, start="best"), 0
    ):
        assert accepted == [False, True, True, True]
        assert rejected == [1, 0, 0, 0]


def train_with_a_hostile_majority() -> list[bool]:
    model, _, handle = attach_model(gaf.GAF(0.5, start="best"), Vector)
    row_loss(model, [1.0, 0.5, 0.1] if dist.get_rank() == 0 else [-1.0, -0.5, -0.1]).backward()
    assert handle.last is not None
    return handle.last.accepted.tolist()


def test_a_hostile_majority_that_agrees_wins(world: World) -> None:
    """No rule that looks at agreement alone can tell it from an honest one."""
    assert world(4).run(train_with_a_hostile_majority) == [[False, True, True, True]] * 4
