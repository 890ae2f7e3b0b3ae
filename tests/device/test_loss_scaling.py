"""gaf.Accumulator with a GradScaler: scales, overflows, skips."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from helpers.accumulating import (
    AGREE,
    DISAGREE,
    ENGINES,
    ROWS_OF_3,
    cpu_scaler,
    feed,
    state_of,
    vector,
)
from helpers.comparing import same
from helpers.digits import (
    Batch,
    close_to_sum,
    flat_grad,
    micro_batches,
    micro_gradients,
    mixed_tau,
    mlp,
)
from helpers.pairs import each_pair


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_update_under_autocast_and_a_scaler_is_unscaled(
    digits: Batch, dtype: torch.dtype, wrap: Callable
) -> None:
    model = mlp()
    amp, batches = cpu_scaler(), micro_batches(digits, 4)
    with torch.autocast("cpu", dtype):
        rows = micro_gradients(model, batches, scale=amp.get_scale())
    tau = mixed_tau(rows)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), wrap(gaf.GAF(tau)), scaler=amp)
    for x, y in batches:
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(x).float(), y)
        acc.backward(loss)
    want, accepted = gaf.reference(rows, tau)
    assert acc.decide().accepted.tolist() == accepted
    # The same half precision backward passes; autocast's gradients are float32, added as such.
    close_to_sum(flat_grad(model), want, rows)
    before = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    acc.step()
    # float32; no second unscaling
    torch.testing.assert_close(
        [p.detach() for p in model.parameters()], before, rtol=1e-6, atol=1e-7
    )


SCALED_OPTIMIZERS = [
    lambda ps: SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    lambda ps: torch.optim.AdamW(ps, 0.1),
    lambda ps: torch.optim.AdamW(ps, 0.1, fused=True),
]


@pytest.mark.parametrize(
    ("make", "bad", "place"), each_pair(SCALED_OPTIMIZERS, [math.inf, math.nan], [0, 1, 2])
)
def test_an_overflow_in_one_micro_batch_stops_the_step_and_the_scale_falls(
    make: Callable, bad: float, place: int
) -> None:
    p = vector()
    optimizer, amp = make([p]), cpu_scaler(backoff_factor=0.25)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5), scaler=amp)
    feed(acc, p, AGREE)
    assert acc.step().stepped
    before, state = p.detach().clone(), state_of(optimizer)
    for i in range(3):
        acc.backward(p.sum() * (bad if i == place else 1.0))
    decision = acc.decide()
    assert not decision.stepped
    assert not decision.accepted.any()
    assert not decision.weights.any()
    assert p.grad is None
    acc.step()
    assert torch.equal(p, before)
    assert same(state, state_of(optimizer))
    assert amp.get_scale() == 2.0**8
    feed(acc, p, AGREE)
    assert acc.step().stepped  # and training goes on


@pytest.mark.parametrize("make", SCALED_OPTIMIZERS, ids=["SGD", "AdamW", "fused AdamW"])
def test_a_skip_by_disagreement_is_no_overflow_to_the_scaler(make: Callable) -> None:
    """The scale stays, and the growth tracker counts until the scale grows."""
    p = vector()
    optimizer, amp = make([p]), cpu_scaler(growth_interval=3)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5), scaler=amp)
    for step in range(3):
        assert amp.get_scale() == 2.0**10
        assert amp.state_dict()["_growth_tracker"] == step
        feed(acc, p, DISAGREE)
        assert not acc.step().stepped
    assert amp.get_scale() == 2.0**11
    assert p.tolist() == [1, 1]
    assert not optimizer.state


def test_the_scaler_moves_as_it_would_in_plain_training() -> None:
    """Overflows at steps 2 and 5 of 8. Two micro-batches agree throughout."""
    p, q = vector(), vector()
    amp, plain_amp = cpu_scaler(growth_interval=2), cpu_scaler(growth_interval=2)
    optimizer, plain = (torch.optim.Adam([x], 0.1) for x in (p, q))
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5), scaler=amp)
    for step in range(8):
        factor = math.inf if step in (2, 5) else 1.0
        for i in range(2):
            acc.backward((p * p).sum() * (factor if i else 1.0))
            plain_amp.scale((q * q).sum() * (factor if i else 1.0) / 2).backward()
        acc.step()
        plain_amp.step(plain)
        plain_amp.update()
        plain.zero_grad()
        assert amp.state_dict() == plain_amp.state_dict()
        assert torch.equal(p, q)
        assert same(state_of(optimizer), state_of(plain))


def test_an_overflow_where_too_few_agree_anyway_still_lowers_the_scale() -> None:
    p = vector()
    amp = cpu_scaler()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5), scaler=amp)
    feed(acc, p, [*DISAGREE, [math.inf, 0.0]])
    assert not acc.step().stepped
    assert amp.get_scale() == 2.0**9


@pytest.mark.parametrize(
    "policy", [gaf.Mean(), gaf.RandomSkip(1.0), gaf.GAF(2.0, start="best")], ids=repr
)
def test_no_policy_steps_on_an_overflow(policy: Any) -> None:
    p = vector()
    amp = cpu_scaler()
    acc = gaf.Accumulator(SGD([p], 0.1), policy, scaler=amp)
    feed(acc, p, [[1.0, 1.0], [math.nan, 1.0]])
    assert not acc.step().stepped
    assert p.tolist() == [1, 1]
    assert amp.get_scale() == 2.0**9


def test_an_overflow_in_one_of_several_optimizers_stops_them_all() -> None:
    p, q, idle = vector(), vector(), vector()
    amp = cpu_scaler()
    acc = gaf.Accumulator(
        [SGD([p], 0.1), SGD([q], 0.1), SGD([idle], 0.1, weight_decay=1.0)], gaf.GAF(2.0), scaler=amp
    )
    for factor in (1.0, math.inf):
        acc.backward(p.sum() + factor * q.sum())
    assert not acc.step().stepped
    assert (p.tolist(), q.tolist(), amp.get_scale()) == ([1, 1], [1, 1], 2.0**9)
    for _ in range(2):
        acc.backward(p.sum() + q.sum())
    assert acc.step().stepped
    assert (idle.tolist(), amp.get_scale()) == ([1, 1], 2.0**9)
    assert p[0] < 1
    assert q[0] < 1


def test_a_skip_under_a_scaler_does_not_touch_a_frozen_float16_parameter() -> None:
    """The scaler refuses float16 gradients; a frozen parameter never has one."""
    frozen, p = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False), vector()
    acc = gaf.Accumulator(SGD([frozen, p], 0.1), gaf.GAF(0.5), scaler=cpu_scaler())
    feed(acc, p, AGREE)
    assert acc.step().stepped
    feed(acc, p, DISAGREE)
    assert not acc.step().stepped


def test_clipping_under_a_scaler_sees_unscaled_gradients() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5), scaler=cpu_scaler())
    feed(acc, p, [[3.0, 4.0], [3.0, 4.0]])
    acc.decide()
    assert nn.utils.clip_grad_norm_([p], 1.0).item() == 5
    acc.step()
    # float32; clipping adds 1e-6 to the norm
    torch.testing.assert_close(p.detach(), torch.tensor([0.94, 0.92]), rtol=0, atol=1e-6)


def test_a_disabled_scaler_is_none_and_may_be_shared() -> None:
    p, q, amp = vector(), vector(), torch.amp.GradScaler("cpu", enabled=False)
    accs = [gaf.Accumulator(SGD([x], 0.1), gaf.GAF(0.5), scaler=amp) for x in (p, q)]
    for acc, x in zip(accs, (p, q), strict=True):
        feed(acc, x, AGREE)
        assert acc.step().stepped


@ENGINES
@pytest.mark.parametrize(
    "policy",
    [gaf.GAF(2.0), gaf.GAF(2.0, min_accepted=1), gaf.Mean(), gaf.RandomSkip(1.0)],
    ids=repr,
)
def test_a_scale_that_has_fallen_to_zero_steps_nothing_and_says_so(
    policy: Any, wrap: Callable
) -> None:
    """As in plain training nothing moves any more: nothing can be unscaled.

    Then the scale is set right.
    """
    p = vector(3)
    scaler = GradScaler("cpu", init_scale=2.0**-148)
    acc = gaf.Accumulator(SGD([p], 0.1, weight_decay=0.5), wrap(policy), scaler=scaler)
    for last in (float("nan"), float("nan"), 1.0, 1.0):
        feed(acc, p, torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, last]]))
        assert not acc.step().stepped
    assert scaler.get_scale() == 0
    assert torch.equal(p, torch.ones(3))
    stats = acc.stats()
    assert (stats["steps"], stats["stepped"], stats["accepted"]) == (4, 0, 0)
    scaler.update(new_scale=8.0)
    feed(acc, p, ROWS_OF_3)
    assert acc.step().stepped
    assert not torch.equal(p, torch.ones(3))
    if not isinstance(policy, gaf.Mean):
        assert acc.stats()["norm_dispersion"] > 0


def test_no_layer_says_that_it_stepped_after_an_overflow() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    scaler = GradScaler("cpu", init_scale=8.0)
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1), gaf.GAF(2.0, scope="layer"), model=model, scaler=scaler
    )
    for bad in (False, True, False):
        for i in range(2):
            loss = model(ROWS_OF_3).square().sum()
            acc.backward(loss + model[0].weight.sum() * float("inf") if bad and i else loss)
        decision = acc.step()
        assert bool(decision.stepped) != bad
        for layer in acc.layers.values():
            assert bool(layer.stepped) != bad
            assert bool(layer.accepted.any()) != bad
            assert bool(layer.weights.any()) != bad
    assert scaler.get_scale() == 4
