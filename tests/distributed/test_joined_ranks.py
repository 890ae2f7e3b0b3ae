"""Ranks that have joined, and shards that hold nothing."""

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
from helpers.attached import RATE, STATEFUL, loss, net
from helpers.problems import same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def join_and_drop(name: str) -> None:
    """A pass that no step follows, while the other rank has no more data: both forget it."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, STATEFUL[name]())
    rank = dist.get_rank()
    with wrapped.join():
        for step in range(2 + 2 * rank):
            for asked in (False, True) if step == 2 else (True,):
                optimizer.zero_grad()
                loss(wrapped, 2 * step + asked).backward()
            optimizer.step()
    assert handle.stats()["steps"] == 4
    states: list[Any] = [None, None]
    dist.all_gather_object(states, handle.state_dict()["policy"])
    assert states[0] == states[1]
    if name == "RandomSkip":
        assert states[0] == {"step": 4}
    same_everywhere(*model.parameters())


@pytest.mark.parametrize("name", ["RandomSkip", "ScheduleTau"])
def test_a_rank_that_has_joined_counts_what_the_others_step_on(world: World, name: str) -> None:
    world(2).run(join_and_drop, name)


class ActorCritic(nn.Module):
    """Its value head has one output: of two shards, one holds it and the other nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.policy, self.value = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x: Tensor, which: str) -> Tensor:
        features = torch.tanh(self.body(x))
        return self.value(features.detach()) if which == "value" else self.policy(features)


def of_one_shard(name: str) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(ActorCritic(), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(model, optimizer, STATEFUL[name](), group=mesh["replicate"])
    rng = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(6):
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=rng)
        model(x, "value").pow(2).mean().backward()
        model(x, "policy").pow(2).mean().backward()
        torch.autograd.grad(model(x, "value").sum(), list(model.value.parameters()))  # for a log
        optimizer.step()
    return handle.stats()["steps"], handle.stats()["stepped"], handle.state_dict()["policy"]


@pytest.mark.parametrize("name", ["RandomSkip", "ScheduleTau"])
def test_shards_that_hold_nothing_count_and_draw_as_the_others(world: World, name: str) -> None:
    first, *others = world(4).run(of_one_shard, name)
    assert first[0] == 12
    assert all(other == first for other in others)


def join_before_the_last_pass(name: str) -> None:
    """The longer rank's last pass is followed by no step; the next epoch is decided alike."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, STATEFUL[name]())
    for _ in range(2):
        with wrapped.join():
            for step in range(2 + 2 * dist.get_rank()):
                optimizer.zero_grad()
                loss(wrapped, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                loss(wrapped, step + 50).backward()
    optimizer.zero_grad()
    loss(wrapped, 9).backward()
    optimizer.step()
    same_everywhere(*model.parameters(), torch.tensor([float(handle.stats()["steps"])]))
    assert handle.stats()["steps"] == 9


@pytest.mark.parametrize("name", ["RandomSkip", "ScheduleTau"])
def test_a_rank_that_had_joined_forgets_a_last_pass_without_a_step(world: World, name: str) -> None:
    world(2).run(join_before_the_last_pass, name)
