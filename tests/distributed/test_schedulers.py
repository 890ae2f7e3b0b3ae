"""Several optimizers, closures, and schedulers that are gated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, StepLR

import gaf
from helpers.attached import (
    RATE,
    Heads,
    attach_model,
    deep,
    difference,
    equal,
    head_loss,
    loss,
    net,
    values,
)
from helpers.problems import Odd, plain_loss, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


# ------------------------------------------------------------------------ optimizers and schedulers


def share_a_decision() -> None:
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
        before = values(model)
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert equal(model, before) == (tau == 0.0)
    same_everywhere(*model.parameters())


def test_several_optimizers_share_one_decision(world: World) -> None:
    world(2).run(share_a_decision)


def shard_the_optimizer() -> None:
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
        assert equal(model, values(twin))


def test_zero_redundancy_optimizer(world: World) -> None:
    world(2).run(shard_the_optimizer)


def step_with_closures() -> None:
    model, optimizer, handle = attach_model(gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 0.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        before = values(model)

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = plain_loss(model, step, dist.get_rank())
            loss.backward()
            return loss

        loss = optimizer.step(closure) if step else optimizer.step(closure=closure)
        assert isinstance(loss, Tensor)
        assert equal(model, before) == (tau == 0.0)


def test_a_closure_that_runs_the_backward_pass_is_filtered_too(world: World) -> None:
    world(2).run(step_with_closures)


def gate_by_skips() -> list[float]:
    model, optimizer, handle = attach_model(gaf.GAF(2.0), lr=1.0)
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
    assert world(2).run(gate_by_skips) == [[0.5, 0.5, 0.5, 0.25]] * 2


# --------------------------------------------------------------------------------- gated schedulers


def gate_by_overflows(name: str, fused: bool) -> None:
    model = deep()
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), 0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0)
    handle = gaf.attach(wrapped, optimizer, POLICIES[name](), scaler=scaler)
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    epochs = []
    for step in range(5):
        optimizer.zero_grad()
        value = loss(wrapped, step)
        if step in (1, 3):
            value = value + float("inf") * model[4].bias.sum()  # of the first bucket alone
        before = values(model)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert (difference(values(model), before) == 0) == (step in (1, 3))
        epochs.append(scheduler.last_epoch)
    assert epochs == [1, 1, 2, 2, 3]
    steps, stepped = handle.stats()["steps"], handle.stats()["stepped"]
    groups = steps // 5 if name == "group" else 1
    assert stepped == 3 * groups
    if name != "Mean" or fused:  # a plain average does not show that it overflowed
        assert steps == 5 * groups


POLICIES: dict[str, Callable[[], Any]] = {
    "Mean": gaf.Mean,
    "group": lambda: gaf.GAF(2.0, scope="group"),
    "GAF": lambda: gaf.GAF(2.0),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_a_gated_scheduler_stands_still_at_an_overflow(
    world: World, name: str, fused: bool
) -> None:
    world(2).run(gate_by_overflows, name, fused)


def gate_anew() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    scheduler = StepLR(optimizer, 1, 0.9)

    def steps(count: int) -> int:
        for step in range(count):
            optimizer.zero_grad()
            loss(wrapped, step).backward()
            optimizer.step()
            scheduler.step()
        return scheduler.last_epoch

    first = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    first.gate(scheduler)
    assert steps(2) == 0
    first.detach()
    assert steps(2) == 2  # free
    second = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    assert steps(2) == 4
    second.gate(scheduler)
    assert steps(2) == 4
    first.detach()  # again: nothing is left of it
    second.policy = gaf.GAF(2.0)
    assert steps(2) == 6


def test_a_scheduler_is_free_after_detach_and_gated_again_by_a_new_handle(world: World) -> None:
    world(2).run(gate_anew)


def gate_in_turns() -> None:
    """Two optimizers of one model that step in turns, each with a scheduler of its own."""
    torch.manual_seed(0)
    model = Heads()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizers = [SGD(part.parameters(), RATE) for part in (model.body, model.heads)]
    handle = gaf.attach(wrapped, optimizers, gaf.GAF(2.0))
    schedulers = [handle.gate(StepLR(one, 1, 0.9)) for one in optimizers]
    for step in range(6):
        model.zero_grad()
        head_loss(wrapped, 0, step).backward()
        optimizers[step % 2].step()
        schedulers[step % 2].step()
    assert [one.last_epoch for one in schedulers] == [3, 3]
    other = StepLR(SGD([nn.Parameter(torch.zeros(1))], RATE), 1)
    with pytest.raises(
        ValueError, match="must drive one of the optimizers that were given to attach"
    ):
        handle.gate(other)


def test_a_gated_scheduler_follows_its_own_optimizer(world: World) -> None:
    world(2).run(gate_in_turns)


def fail_a_step() -> None:
    """An optimizer whose step fails has taken none."""
    model = net(6, 8, 3)

    class Failing(SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise OSError("no")
            return super().step(closure)

    wrapped, optimizer = DistributedDataParallel(model), Failing(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step in range(3):
        optimizer.fails = step == 1
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        if optimizer.fails:
            with pytest.raises(OSError, match="no"):
                optimizer.step()
        else:
            optimizer.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"]) == (2, 2)


def test_a_step_that_fails_is_not_counted(world: World) -> None:
    world(2).run(fail_a_step)
