"""What belongs to which pass: gradients that come early or on some ranks only, and skips."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import gaf
from helpers.attached import (
    RATE,
    Branches,
    branch_loss,
    deep,
    difference,
    loss,
    momentum,
    values,
    which_moved,
)
from helpers.problems import micro_gradients, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


SMALL = 200 / 2**20  # MiB: a bucket for each layer


class OtherOrder(nn.Module):
    """Its head is registered first and used last: gradients arrive before their bucket's turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3, bias=False)
        self.body = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(x)


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def mixed_precision_net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(6):
        dtype = torch.float64 if i % 2 else torch.float32
        layers += [To(dtype), nn.Linear(6, 6, bias=False, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers, To(torch.float32), nn.Linear(6, 3, bias=False))


def send_early(make: Callable[[], nn.Module], scope: str, ddp: dict[str, Any]) -> None:
    model = make()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=SMALL, **ddp)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope))
    for step in range(4):
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        before = values(model)
        optimizer.step()
        assert all(which_moved(model, before))
        same_everywhere(*model.parameters())
    assert handle.stats()["stepped"] == handle.stats()["steps"] > 0


@pytest.mark.parametrize("scope", ["all", "group"])
@pytest.mark.parametrize(
    ("make", "ddp"),
    [
        (OtherOrder, {"find_unused_parameters": True}),
        (OtherOrder, {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
        (mixed_precision_net, {}),
    ],
)
def test_gradients_may_arrive_before_their_buckets_turn(
    world: World, make: Callable[[], nn.Module], scope: str, ddp: dict[str, Any]
) -> None:
    world(2).run(send_early, make, scope, ddp)


def swap_branches(clear: str) -> None:
    """Rank r takes branch r in the first pass, and the other in the second."""
    rank = dist.get_rank()
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    branch_loss(wrapped, rank, 0).backward()
    optimizer.step()
    if clear == "none":
        model.shared.zero_grad()
    else:
        optimizer.zero_grad(set_to_none=clear == "to None")
    rows = micro_gradients(model, 1, 2, lambda m, step, r: branch_loss(m, 1 - r, step, r))
    branch_loss(wrapped, 1 - rank, 1).backward()
    if clear == "none":
        with pytest.raises(RuntimeError, match="must be cleared before a backward pass"):
            optimizer.step()
        return
    assert handle.last is not None
    _, right = gaf.aggregate(rows, gaf.GAF(2.0))
    torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
    optimizer.step()
    same_everywhere(*model.parameters())


@pytest.mark.parametrize("clear", ["none", "to None", "to zeros"])
def test_updates_of_parameters_that_other_ranks_have_used_are_noticed_too(
    world: World, clear: str
) -> None:
    world(2).run(swap_branches, clear)


def draw_alike() -> None:
    """Passes without a step, over branches that differ by rank: RandomSkip draws alike."""
    rank = dist.get_rank()
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE, momentum=0.9)
    handle = gaf.attach(wrapped, optimizer, gaf.RandomSkip(0.5, seed=1))
    for step in range(8):
        for asked in (False, True):
            optimizer.zero_grad()
            branch_loss(wrapped, (rank + step) % 2, 2 * step + asked).backward()
        before = values(model)
        optimizer.step()
        expected = any(gaf.RandomSkip(0.5, seed=1).planned(step, 2))
        assert any(which_moved(model, before)) == expected
        same_everywhere(*model.parameters())
    assert handle.state_dict()["policy"] == {"step": 8}


def test_a_policys_draws_stay_together_where_ranks_use_different_parameters(world: World) -> None:
    world(2).run(draw_alike)


def clear_with_zeros(name: str) -> None:
    model = deep()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6)
    optimizer = momentum(model)
    policies = {"RandomSkip": gaf.RandomSkip(0.5, seed=1), "GAF": gaf.GAF(2.0)}
    handle = gaf.attach(wrapped, optimizer, policies[name])
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    went = []
    for step in range(6):
        if name == "GAF":
            handle.policy = gaf.GAF(0.0 if step in (2, 4) else 2.0)
        optimizer.zero_grad(set_to_none=False)
        loss(wrapped, step).backward()
        for p in model.parameters():  # a decay of the loop's own: a skip is more than zeros
            p.grad.add_(p, alpha=0.1)
        before = values(model)
        optimizer.step()
        scheduler.step()
        assert handle.last is not None
        assert set(which_moved(model, before)) == {bool(handle.last.stepped)}
        went.append(bool(handle.last.stepped))
    assert set(went) == {True, False}
    assert scheduler.last_epoch == handle.stats()["stepped"] == sum(went)


@pytest.mark.parametrize("name", ["RandomSkip", "GAF"])
def test_a_skip_holds_where_gradients_are_cleared_with_zeros(world: World, name: str) -> None:
    world(2).run(clear_with_zeros, name)


def skip_the_first_pass(detaches: bool) -> None:
    """RandomSkip and GAF: two passes share a step; the first is a skip, the second is not."""
    for policies in ([gaf.RandomSkip(0.0), gaf.Mean()], [gaf.GAF(0.0), gaf.GAF(2.0)]):
        model = Branches()
        model.shared.requires_grad_(False)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = SGD(model.own.parameters(), RATE, momentum=0.9, weight_decay=0.1)
        handle = gaf.attach(wrapped, optimizer, policies[1])
        for which in (0, 1):  # there is momentum now
            branch_loss(wrapped, which, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [values(head) for head in model.own]
        for which, policy in enumerate(policies):
            handle.policy = policy
            branch_loss(wrapped, which, 1).backward()
        if detaches:
            handle.detach()
        optimizer.step()
        assert difference(values(model.own[0]), before[0]) == 0
        assert difference(values(model.own[1]), before[1]) > 0


@pytest.mark.parametrize("detaches", [False, True])
def test_an_earlier_pass_of_the_same_step_stays_skipped(world: World, detaches: bool) -> None:
    world(2).run(skip_the_first_pass, detaches)


def decay_by_hand() -> None:
    """Branches that differ by rank, cleared with zeros, decay by the loop: a skip moves nothing."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 2.0, 0.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        optimizer.zero_grad(set_to_none=False)
        branch_loss(wrapped, dist.get_rank(), step).backward()
        for p in model.parameters():
            p.grad.add_(p.detach(), alpha=0.1)
        before = values(model)
        optimizer.step()
        assert set(which_moved(model, before)) == {tau == 2.0}
        same_everywhere(*model.parameters())


def test_a_skip_moves_nothing_where_ranks_use_different_parameters(world: World) -> None:
    world(2).run(decay_by_hand)
