"""What belongs to which step: optimizers with steps and closures of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

import gaf
from helpers.attached import RATE, loss, momentum, net, values, which_moved
from helpers.ranks import World

pytestmark = pytest.mark.distributed


# ----------------------------------------------------------------------------------------- the step


class Derived(SGD):
    """A step that calls its base class's: torch runs the hooks for both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Named(Optimizer):
    """Closures under another name, and arguments beside them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": RATE})
        self.scale = 0.0

    @torch.no_grad()
    def step(self, loss_fn: Any = None, scale: float = 1.0) -> Any:  # type: ignore[override]
        self.scale = scale
        if loss_fn is not None:
            with torch.enable_grad():
                loss_fn()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad if p.grad is not None else 0.0, alpha=-RATE)


def step_within_a_step() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), Derived(model.parameters(), RATE)
    SGD([nn.Parameter(torch.zeros(1))], RATE)  # the base class is hooked as well
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    for step, tau in enumerate((2.0, 0.0, 2.0, 0.0)):
        handle.policy = gaf.GAF(tau)
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
        scheduler.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"], scheduler.last_epoch) == (4, 2, 2)


def give_closures_by_name() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), Named(model.parameters())
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 0.0)):
        handle.policy = gaf.GAF(tau)

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            loss(wrapped, step).backward()

        before = values(model)
        optimizer.step(loss_fn=closure) if step else optimizer.step(closure, 7.0)
        assert set(which_moved(model, before)) == {tau == 2.0}
        assert optimizer.scale == (1.0 if step else 7.0)


def step_with_strangers() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    another = momentum(model)
    elsewhere = SGD([nn.Parameter(torch.zeros(1))], RATE)
    loss(wrapped, 0).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match="every optimizer that steps on the model's parameters"):
        another.step()
    assert not any(which_moved(model, before))
    elsewhere.step()
    handle.detach()
    another.step()


@pytest.mark.parametrize("task", [step_within_a_step, give_closures_by_name, step_with_strangers])
def test_steps_that_optimizers_take_in_ways_of_their_own(
    world: World, task: Callable[[], None]
) -> None:
    world(2).run(task)


# ----------------------------------------------------------------------------------------- closures


class StarArguments(SGD):
    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().step(*args, **kwargs)


class Around(Optimizer):
    """As SAM: runs the closure itself, and lets another optimizer step."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, {})
        self.base = SGD(params, RATE, momentum=0.9)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.base.step()
        return loss


def evaluate_closures(kind: Callable[..., Optimizer], word: str) -> None:
    SGD([nn.Parameter(torch.zeros(1))], RATE)  # the base class is hooked as well
    model = net(6, 8, 3)
    options = {} if kind is Around else {"lr": RATE, "momentum": 0.9}
    wrapped, optimizer = DistributedDataParallel(model), kind(model.parameters(), **options)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9)) if kind is not Around else None
    for step, tau in enumerate((2.0, 2.0, None, 0.0, 2.0, 0.0)):
        if tau is not None:
            handle.policy = gaf.GAF(tau)

        def closure(step: int = step, tau: float | None = tau) -> Tensor:
            optimizer.zero_grad()
            if tau is None:
                raise ArithmeticError("a broken batch")
            value = loss(wrapped, step)
            value.backward()
            return value

        before = values(model)
        if tau is None:
            with pytest.raises(ArithmeticError):
                optimizer.step(closure)
            continue
        optimizer.step(**{word: closure}) if word else optimizer.step(closure)
        assert set(which_moved(model, before)) == {tau == 2.0}
        if scheduler is not None:
            scheduler.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"]) == (5, 3)
    assert scheduler is None or scheduler.last_epoch == 3


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (SGD, ""),
        (SGD, "closure"),
        (Derived, ""),
        (StarArguments, ""),
        (StarArguments, "closure"),
        (Around, ""),
    ],
)
def test_closures_are_filtered_whatever_the_optimizer_does_with_them(
    world: World, kind: type, word: str
) -> None:
    world(2).run(evaluate_closures, kind, word)


def delete_wrappers() -> None:
    """A function that wraps, attaches and returns leaves no hook, and stops no later optimizer."""
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    model = net(6, 8, 3)
    found = []
    for step in range(3):
        wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
        gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
        loss(wrapped, step).backward()
        optimizer.step()
        model.zero_grad()
        del wrapped, optimizer
        before = values(model)
        loss(model, step).backward()
        SGD(model.parameters(), RATE).step()  # plain training goes on
        assert all(which_moved(model, before))
        model.zero_grad()
        found.append(len(_global_optimizer_pre_hooks))
    assert found[0] == found[2]


def test_a_wrapper_that_is_gone_stops_no_later_optimizer(world: World) -> None:
    world(2).run(delete_wrappers)
