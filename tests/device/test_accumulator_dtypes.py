"""Dtypes, layouts and devices of parameters and their gradients."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from gaf.device.rows import rows_without_waiting
from helpers.accumulating import ENGINES, POLICIES, ROWS_OF_4, feed, stacked, vector
from helpers.digits import (
    Batch,
    close_to_sum,
    conv_net,
    flat_grad,
    micro_batches,
    micro_gradients,
    mixed_tau,
    mlp,
)
from helpers.pairs import each_pair


def test_channels_last_parameters_and_their_gradients_are_read_alike(digits: Batch) -> None:
    model = conv_net().to(memory_format=torch.channels_last)
    batches = [
        (x.contiguous(memory_format=torch.channels_last), y) for x, y in micro_batches(digits, 4)
    ]
    rows = micro_gradients(model, batches)
    tau = mixed_tau(rows)
    for rule in (gaf.GAF(tau), stacked(gaf.GAF(tau))):
        acc = gaf.Accumulator(SGD(model.parameters(), 0.0), rule)
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        want, accepted = gaf.reference(rows, tau)
        assert acc.decide().accepted.tolist() == accepted
        close_to_sum(flat_grad(model), want, rows)
        acc.step()


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes_are_decided_and_updated_alike(
    digits: Batch, dtype: torch.dtype, wrap: Callable
) -> None:
    model = mlp(dtype)
    batches = [(x.to(dtype), y) for x, y in micro_batches(digits, 4)]
    rows = micro_gradients(model, batches)
    tau = mixed_tau(rows)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), wrap(gaf.GAF(tau)))
    for x, y in batches:
        acc.backward(cross_entropy(model(x).float(), y))
    want, accepted = gaf.reference(rows, tau)
    assert acc.decide().accepted.tolist() == accepted
    assert all(p.grad.dtype == dtype for p in model.parameters())
    # At most four roundings, each half a unit in the last place, of sums of at most four of the
    # largest entry.
    close_to_sum(flat_grad(model), want, rows, torch.finfo(dtype).eps)
    acc.step()


def test_dtypes_may_be_mixed() -> None:
    params = [
        vector(2, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ]
    acc = gaf.Accumulator(SGD(params, 0.5), gaf.GAF(0.5))
    for factor in (1.0, 3.0, -1.0):
        acc.backward(sum(factor * p.sum().double() for p in params))
    assert acc.decide().accepted.tolist() == [True, True, False]
    assert [p.grad.dtype for p in params] == [p.dtype for p in params]
    acc.step()
    assert all(p.tolist() == [0, 0] for p in params)


def test_the_mean_of_large_float16_gradients_is_finite() -> None:
    p = vector(2, torch.float16)
    acc = gaf.Accumulator(SGD([p], 1e-4), gaf.GAF(0.5))
    feed(acc, p, [[40_000.0, 0.0], [40_000.0, 0.0]])
    acc.decide()
    assert p.grad.tolist() == [40_000, 0]


@ENGINES
def test_half_precision_micro_gradients_are_added_up_in_float32(wrap: Callable) -> None:
    """In bfloat16 256 + 1 is 256: fifteen rows would leave no trace."""
    p = vector(1, torch.bfloat16)
    acc = gaf.Accumulator(SGD([p], 1e-4), wrap(gaf.GAF(2.0)))
    feed(acc, p, [[256.0]] + [[1.0]] * 15)
    acc.decide()
    assert p.grad.item() == torch.tensor(271 / 16).bfloat16().item()


def test_the_model_may_change_its_dtype_between_macro_batches() -> None:
    model = nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0))
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for _ in range(2):
            acc.backward(model(torch.ones(1, 2, dtype=dtype)).sum())
        assert acc.step().stepped


@pytest.mark.parametrize(("s", "g"), [(1e30, 1e10), (1e-30, 1e-14)])
def test_a_row_is_judged_by_its_angle_to_a_sum_out_of_float32s_range(s: float, g: float) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(0.5))
    feed(acc, p, [[s, s], [g, -0.5 * g]])
    # float32 arithmetic
    assert acc.decide().distances[1].item() == pytest.approx(
        1 - 0.5 / math.sqrt(2 * 1.25), abs=1e-6
    )


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_gradients_of_a_dtype_of_their_own_keep_it(policy: Any, dtype: torch.dtype | None) -> None:
    p = vector(4, dtype=torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = dtype
    acc = gaf.Accumulator(SGD([p], 0.1, foreach=False), policy)
    for row in ROWS_OF_4:
        acc.backward((p * row).sum())
    acc.decide()
    assert p.grad is not None
    assert p.grad.dtype == torch.float32
    torch.testing.assert_close(p.grad, gaf.aggregate(ROWS_OF_4, policy)[0])
    acc.step()


@pytest.mark.parametrize("bad", [False, True])
def test_a_skip_under_a_scaler_gives_it_a_gradient_of_the_right_dtype(bad: bool) -> None:
    p = vector(4, dtype=torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    acc = gaf.Accumulator(SGD([p], 0.1, foreach=False), gaf.GAF(0.0), scaler=scaler)
    feed(acc, p, torch.cat([ROWS_OF_4, ROWS_OF_4[:1] * float("inf")]) if bad else ROWS_OF_4)
    assert not acc.step().stepped
    assert scaler.get_scale() == (4.0 if bad else 8.0)


@pytest.mark.parametrize(
    ("dtype", "equal", "average", "engine"),
    each_pair(
        [torch.bfloat16, torch.float16],
        [True, False],
        ["mean", "halving"],
        ["on the CPU", "without waiting"],
    ),
)
@pytest.mark.usefixtures("unchecked")
def test_half_precision_distances_of_many_rows_are_those_of_the_gram_matrix(
    dtype: torch.dtype,
    equal: bool,
    average: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    k, n = 384, 1024  # a sum of equal rows in bfloat16 stands still from 256 on
    g = torch.randn(n)
    rows = torch.stack([(g if equal else g + torch.randn(n)).to(dtype) for _ in range(k)])
    if engine == "without waiting":
        monkeypatch.setattr("gaf.device.accumulate.rows_for", rows_without_waiting)
    policy = gaf.GAF(2.0, average=average)
    p = vector(n, dtype)
    acc = gaf.Accumulator(SGD([p], 0.0), policy)
    feed(acc, p, rows)
    update, decision = gaf.aggregate(rows, policy)
    distances = acc.decide().distances
    # sums of 384 float32 terms: some 2^-24 sqrt(384), and equal rows at distance 0, where the
    # cosine's own digits show
    torch.testing.assert_close(distances, decision.distances, rtol=0, atol=2e-5)
    assert p.grad is not None
    # one rounding to half precision
    torch.testing.assert_close(p.grad, update)


def trained(policy: Any, **options: Any) -> list[Any]:
    """Three macro-batches: decisions, statistics, parameters. All tensors here name the CPU."""
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)
    x = torch.randn(12, 8, 5, generator=generator, device=cpu)
    y = torch.randint(3, (12, 8), generator=generator, device=cpu)
    with cpu:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    scaled = options.pop("scaled", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1, momentum=0.9), policy, model=model, scaler=scaler, **options
    )
    for macro in range(3):
        for i in range(4):
            factor = float("nan") if scaled and macro == 1 and i == 2 else 1.0
            acc.backward(factor * cross_entropy(model(x[4 * macro + i]), y[4 * macro + i]))
        acc.decide()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        acc.step()
    assert acc.last is not None
    return [
        acc.last.distances.tolist(),
        acc.stats(),
        *(t.tolist() for t in model.state_dict().values()),
    ]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (gaf.GAF(0.9), {}),
        (gaf.GAF(0.9, average="halving"), {}),
        (gaf.Mean(), {}),
        (gaf.GAF(0.9, start="best"), {}),
        (gaf.GAF(0.9, scope="layer"), {}),
        (gaf.GAF(0.9), {"scaled": True}),
        (gaf.GAF(0.0), {"scaled": True}),
        (gaf.GAF(0.9), {"bn": "accepted"}),
        (gaf.GAF(0.9), {"leave_out": lambda name, p: name.endswith("bias")}),
    ],
    ids=["mean", "halving", "plain", "best", "layer", "scaler", "skip", "bn", "leave_out"],
)
def test_a_default_device_changes_nothing(policy: Any, options: dict[str, Any]) -> None:
    """Under "meta" a tensor made without a device has no value."""
    expected = trained(policy, **options)
    torch.set_default_device("meta")
    try:
        found = trained(policy, **options)
    finally:
        torch.set_default_device(None)
    assert str(found) == str(expected)  # NaN is NaN


def test_a_parameter_may_change_its_layout_between_macro_batches() -> None:
    """It turns channels-last."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    twin, x = copy.deepcopy(model), torch.randn(8, 2, 3, 8, 8)
    for each in (model, twin):
        acc = gaf.Accumulator(SGD(each.parameters(), 0.1), gaf.GAF(2.0))
        for macro in range(3):
            if each is model and macro == 1:
                each.to(memory_format=torch.channels_last)
            for batch in x[2 * macro : 2 * macro + 2]:
                acc.backward(each(batch).square().mean())
            acc.decide()
            if macro > 0 and each is model:
                assert each.weight.grad is not None
                assert each.weight.grad.stride() == each.weight.stride()
            acc.step()
    torch.testing.assert_close(model.weight, twin.weight)


def test_parameters_must_be_on_one_device() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match="on one device; they are on cpu, meta"):
        gaf.Accumulator(SGD(params, 0.1), gaf.GAF())
