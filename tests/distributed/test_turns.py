"""Two models that take turns, and heads or a GAN that share steps."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import gaf
from helpers.attached import RATE, Branches, branch_loss, difference, net, values
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def train_gan(clears: bool, policy: Any) -> tuple[list[Tensor], Any, Any, Any]:
    """A GAN's loop. clears: whether the generator's step first clears the discriminator's."""
    torch.manual_seed(0)
    generator, critic = DistributedDataParallel(net(4, 4)), DistributedDataParallel(net(4, 3, 1))
    of_g, of_c = (SGD(m.parameters(), RATE, momentum=0.9) for m in (generator, critic))
    first = second = scheduler = None
    scheduler = StepLR(of_c, 1, 0.9)
    if policy is not None:
        first, second = gaf.attach(generator, of_g, policy()), gaf.attach(critic, of_c, policy())
        second.gate(scheduler)
    rng = torch.Generator().manual_seed(dist.get_rank())
    judge = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)
    for _ in range(6):
        z, x = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
        of_c.zero_grad()
        both = torch.cat([x, generator(z).detach()])
        judge(critic(both), torch.cat([real, fake])).backward()
        of_c.step()
        scheduler.step()
        if clears:
            of_c.zero_grad()
        of_g.zero_grad()
        judge(critic(generator(z)), real).backward()
        of_g.step()
    return [*values(generator), *values(critic)], first, second, scheduler


def take_turns(clears: bool) -> None:
    plain, *_ = train_gan(clears, None)
    filtered, first, second, scheduler = train_gan(clears, lambda: gaf.GAF(2.0))
    assert difference(plain, filtered) < 1e-6
    assert scheduler.last_epoch == 6
    for handle in (first, second):
        assert (handle.stats()["steps"], handle.stats()["stepped"]) == (6, 6)
        assert handle.stats()["micro_gradients"] == 12


@pytest.mark.parametrize("clears", [True, False])
def test_a_handle_counts_its_own_models_steps_only(world: World, clears: bool) -> None:
    world(2).run(take_turns, clears)


def learn_in_turns() -> None:
    """A policy learns from the steps taken on its decisions: RandomSkip draws once for each."""
    _, first, second, scheduler = train_gan(True, lambda: gaf.RandomSkip(0.5, seed=1))
    expected = [any(gaf.RandomSkip(0.5, seed=1).planned(step, 2)) for step in range(6)]
    for handle in (first, second):
        assert handle.state_dict()["policy"] == {"step": 6}
    assert second.stats()["stepped"] == scheduler.last_epoch == sum(expected)
    assert first.stats()["stepped"] == sum(expected)


def test_a_policy_learns_from_its_own_models_steps_only(world: World) -> None:
    world(2).run(learn_in_turns)


def alternate_heads() -> None:
    """Heads in turn, each with a step of its own, cleared with zeros."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        branch_loss(wrapped, step % 2, step).backward()
        optimizer.step()
    assert handle.stats()["steps"] == handle.stats()["stepped"] == 4


def test_heads_in_turn_count_a_step_each(world: World) -> None:
    world(2).run(alternate_heads)


def count_turns(clears: bool, none: bool, freezes: bool) -> list[int]:
    """A GAN's loop with every way of clearing; the critic's first layer may be frozen (FreezeD)."""
    torch.manual_seed(0)
    generator = DistributedDataParallel(net(4, 4))
    critic = DistributedDataParallel(net(4, 3, 1), find_unused_parameters=True)
    of_g, of_c = (SGD(m.parameters(), RATE) for m in (generator, critic))
    handle = gaf.attach(critic, of_c, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(of_c, 1, 0.9))
    rng = torch.Generator().manual_seed(dist.get_rank())
    judge = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)
    for step in range(6):
        if freezes and step == 3:
            critic.module[0].requires_grad_(False)
        z, x = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
        of_c.zero_grad(set_to_none=none)
        both = torch.cat([x, generator(z).detach()])
        judge(critic(both), torch.cat([real, fake])).backward()
        of_c.step()
        scheduler.step()
        if clears:
            of_c.zero_grad(set_to_none=none)
        of_g.zero_grad(set_to_none=none)
        judge(critic(generator(z)), real).backward()
        of_g.step()
    stats = handle.stats()
    return [stats["steps"], stats["stepped"], scheduler.last_epoch]


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize(("none", "freezes"), [(True, False), (False, False), (True, True)])
def test_a_gan_is_counted_right_however_it_clears(
    world: World, clears: bool, none: bool, freezes: bool
) -> None:
    assert world(2).run(count_turns, clears, none, freezes) == [[6, 6, 6]] * 2


def draw_in_turns() -> None:
    """A GAN that clears with zeros, under a policy that skips: each critic's step draws once."""
    torch.manual_seed(0)
    generator, critic = DistributedDataParallel(net(4, 4)), DistributedDataParallel(net(4, 6, 1))
    of_g, of_c = SGD(generator.parameters(), RATE), SGD(critic.parameters(), RATE)
    handle = gaf.attach(critic, of_c, gaf.RandomSkip(0.5, seed=1))
    rng = torch.Generator().manual_seed(dist.get_rank())
    judge = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)
    for _ in range(12):
        z, x = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
        of_c.zero_grad(set_to_none=False)
        both = torch.cat([x, generator(z).detach()])
        judge(critic(both), torch.cat([real, fake])).backward()
        of_c.step()
        of_g.zero_grad(set_to_none=False)
        judge(critic(generator(z)), real).backward()
        of_g.step()
    assert handle.stats()["steps"] == 12
    assert handle.state_dict()["policy"] == {"step": 12}


def test_a_gan_that_clears_with_zeros_draws_once_a_step(world: World) -> None:
    world(2).run(draw_in_turns)
