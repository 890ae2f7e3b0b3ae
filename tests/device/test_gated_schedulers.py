"""Schedulers that pause on a skip."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

import gaf
from helpers.accumulating import AGREE, DISAGREE, feed, vector

PATTERN = (False, True, True, False, True, False, False, True)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: StepLR(o, 2, 0.5),
        lambda o: OneCycleLR(o, 1.0, total_steps=20),
        lambda o: SequentialLR(o, [LambdaLR(o, lambda e: 0.5), StepLR(o, 1, 0.9)], [2]),
    ],
    ids=["StepLR", "OneCycleLR", "SequentialLR"],
)
def test_a_gated_scheduler_moves_with_the_steps_that_are_taken(make: Callable) -> None:
    p, q = vector(), vector()
    optimizer, plain = SGD([p], 0.1, momentum=0.9), SGD([q], 0.1, momentum=0.9)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    scheduler, want = make(optimizer), make(plain)
    keys = scheduler.state_dict().keys()
    assert acc.gate(scheduler) is scheduler
    with warnings.catch_warnings():
        # such as "scheduler.step() before optimizer.step()", after the skip that comes first
        warnings.simplefilter("error")
        for agree in PATTERN:
            feed(acc, p, AGREE if agree else DISAGREE)
            assert acc.step().stepped == agree
            scheduler.step()
            if agree:
                plain.step()
                want.step()
            assert scheduler.get_last_lr() == want.get_last_lr()
            assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert scheduler.state_dict().keys() == keys
    assert isinstance(scheduler, type(want))
    assert type(scheduler).__name__ == type(want).__name__


def test_a_second_call_without_a_step_between_moves_nothing() -> None:
    p = vector()
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    scheduler = acc.gate(StepLR(optimizer, 1, 0.5))
    feed(acc, p, AGREE)
    acc.step()
    for _ in range(3):
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


def test_gating_twice_is_gating_once() -> None:
    p = vector()
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    scheduler = acc.gate(acc.gate(StepLR(optimizer, 1, 0.5)))
    for agree in (True, False):
        feed(acc, p, AGREE if agree else DISAGREE)
        acc.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


def test_a_scheduler_stepped_once_per_epoch_is_noticed() -> None:
    p = vector()
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    scheduler = acc.gate(StepLR(optimizer, 1, 0.5))
    for _ in range(2):
        for _ in range(4):
            feed(acc, p, AGREE)
            acc.step()
        if not scheduler.last_epoch:
            scheduler.step()
    with pytest.raises(
        RuntimeError, match=r"StepLR\.step\(\) must be called after every step.*4 steps went by"
    ):
        scheduler.step()


@pytest.mark.parametrize("agree", [True, False])
def test_a_scheduler_gated_before_the_state_is_loaded_moves_with_the_next_step(agree: bool) -> None:
    p = vector()
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    for _ in range(3):
        feed(acc, p, AGREE)
        acc.step()
    state = acc.state_dict()
    other = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    if agree:  # going back: the counts fall
        state = other.state_dict()
        other = acc
    scheduler = other.gate(StepLR(optimizer, 1, 0.5))
    other.load_state_dict(state)
    feed(other, p, AGREE if agree else DISAGREE)
    assert other.step().stepped == agree
    scheduler.step()
    assert scheduler.get_last_lr() == [0.05 if agree else 0.1]


def test_a_gated_schedulers_state_goes_into_an_ungated_one_and_back() -> None:
    p = vector()
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    gated, plain = acc.gate(StepLR(optimizer, 1, 0.5)), StepLR(SGD([vector()], 1.0), 1, 0.5)
    feed(acc, p, AGREE)
    acc.step()
    gated.step()
    plain.load_state_dict(gated.state_dict())
    assert plain.state_dict() == gated.state_dict()
    gated.load_state_dict(plain.state_dict())
    feed(acc, p, AGREE)
    acc.step()
    gated.step()
    assert gated.get_last_lr() == [0.25]


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_stepped_with_the_optimizer_cannot_be_gated() -> None:
    optimizer = SGD([vector()], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    with pytest.raises(TypeError, match="ReduceLROnPlateau is stepped once per evaluation"):
        acc.gate(ReduceLROnPlateau(optimizer))
    for thing in (optimizer, None, "StepLR"):
        with pytest.raises(
            TypeError,
            match=f"must be a torch.optim.lr_scheduler.LRScheduler; got {type(thing).__name__}",
        ):
            acc.gate(thing)  # type: ignore[arg-type]


def test_a_copy_of_a_gated_scheduler_is_a_plain_one() -> None:
    p = vector()
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    gated = acc.gate(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert type(other) is torch.optim.lr_scheduler.StepLR
        assert other.state_dict() == gated.state_dict()
