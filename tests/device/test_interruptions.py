"""An exception in the step, and leaving a macro-batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import gaf
from helpers.accumulating import (
    ENGINES,
    ROWS_OF_2,
    ROWS_OF_3,
    SCALED,
    feed,
    line,
    loss_of,
    scaler_for,
    vector,
)


class Fails(SGD):
    """Raises while `broken`, after it has moved its parameters or before."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        if self.broken:
            raise MemoryError("in step")
        return super().step(closure)


@SCALED
@ENGINES
def test_an_exception_in_the_optimizers_step_ends_the_macro_batch_and_counts_no_step(
    wrap: Callable, scaled: bool
) -> None:
    p, twin = vector(3), vector(3)
    optimizer, plain = Fails([p], 0.1, momentum=0.9), SGD([twin], 0.1, momentum=0.9)
    scaler = scaler_for(scaled)
    acc = gaf.Accumulator(optimizer, wrap(gaf.GAF(2.0)), scaler=scaler)
    scheduler = acc.gate(StepLR(optimizer, 1, 0.5))
    for broken in (False, True, False):
        optimizer.broken = broken
        feed(acc, p, ROWS_OF_3)
        if broken:
            with pytest.raises(MemoryError):
                acc.step()
            acc.discard()  # nothing waits
            assert p.grad is None
            assert acc.last is not None
            assert acc.outcome is not None
            assert not acc.last.stepped
            assert not acc.outcome.stepped
            scheduler.step()
        else:
            assert acc.step().stepped
            twin.grad = ROWS_OF_3.mean(0)
            plain.step()
            scheduler.step()
            plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    stats = acc.stats()
    assert (stats["steps"], stats["stepped"], stats["micro_gradients"]) == (3, 2, 6)
    assert (stats["accepted"], stats["rejected"], stats["acceptance"]) == (4, 2, 2 / 3)
    assert scheduler.last_epoch == 2
    torch.testing.assert_close(p, twin)
    if (
        scaler is not None
    ):  # three updates without an overflow, as it would see them in plain training
        assert scaler.get_scale() == 16.0


def test_layers_show_no_step_after_an_exception_in_it() -> None:
    model = nn.Linear(3, 1)
    optimizer = Fails(model.parameters(), 0.1)
    optimizer.broken = True
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0, scope="layer"), model=model)
    for _ in range(2):
        acc.backward(model(ROWS_OF_3).square().sum())
    with pytest.raises(MemoryError):
        acc.step()
    assert not any(decision.stepped for decision in acc.layers.values())


@ENGINES
def test_a_step_that_a_hook_of_the_users_refuses_leaves_the_accumulator_usable(
    wrap: Callable,
) -> None:
    p = vector(3)
    optimizer = SGD([p], 1.0)

    def refuse(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(refuse)
    acc = gaf.Accumulator(optimizer, wrap(gaf.GAF(2.0)))
    feed(acc, p, ROWS_OF_3)
    with pytest.raises(KeyboardInterrupt):
        acc.step()
    hook.remove()
    assert torch.equal(p, torch.ones(3))
    state = acc.state_dict()  # between macro-batches
    feed(acc, p, ROWS_OF_3)
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS_OF_3.mean(0))
    acc.load_state_dict(state)
    assert acc.stats()["stepped"] == 0


def test_discard_drops_what_waits_and_nothing_else() -> None:
    p = nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF())
    acc.backward(torch.dot(p, torch.tensor([5.0, 5.0])))
    with pytest.raises(RuntimeError, match="between macro-batches"):
        acc.load_state_dict({})
    acc.discard()
    assert not acc.waiting
    assert acc.stats()["micro_gradients"] == 0
    acc.load_state_dict(acc.state_dict())
    for row in ROWS_OF_2:
        acc.backward(torch.dot(p, row))
    acc.step()
    torch.testing.assert_close(p.data, -ROWS_OF_2.mean(0))


def test_discard_after_decide_is_refused() -> None:
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, gaf.GAF())
    for _ in range(2):
        acc.backward(loss_of(model))
    acc.decide()
    with pytest.raises(RuntimeError, match="discard\\(\\) came after decide\\(\\)"):
        acc.discard()
