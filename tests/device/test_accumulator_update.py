"""The update against the paper's algorithm on separately computed micro-gradients."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from gaf.device.rows import rows_without_waiting
from helpers.accumulating import ENGINES, feed, stacked, vector
from helpers.comparing import same
from helpers.digits import (
    NETS,
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


@pytest.mark.parametrize(
    ("net", "k", "average"), each_pair(list(NETS), [2, 3, 5, 8], ["mean", "halving"])
)
def test_the_gradient_after_decide_is_the_papers_update(
    digits: Batch, net: str, k: int, average: str
) -> None:
    """Over three macro-batches with steps in between; the micro-gradients apart, in float64."""
    model = NETS[net]()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    for macro in range(3):
        batches = micro_batches(digits, k, macro)
        rows = micro_gradients(model, batches)
        tau = mixed_tau(rows)
        acc = gaf.Accumulator(optimizer, gaf.GAF(tau, average=average))
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        decision = acc.decide()
        want, accepted = gaf.reference(rows, tau, average)
        assert decision.accepted.tolist() == accepted
        assert want is not None
        close_to_sum(flat_grad(model), want, rows)
        acc.step()


def test_the_problems_above_have_accepted_and_rejected_rows(digits: Batch) -> None:
    rows = micro_gradients(conv_net(), micro_batches(digits, 8))
    _, accepted = gaf.reference(rows, mixed_tau(rows))
    assert 2 <= sum(accepted) < 8


STREAMING = [
    gaf.GAF(0.55),
    gaf.GAF(0.55, average="halving"),
    gaf.GAF(0.0),
    gaf.GAF(2.0),
    gaf.GAF(0.55, min_accepted=4),
    gaf.Mean(),
]


@pytest.mark.parametrize("policy", STREAMING, ids=repr)
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.filterwarnings("ignore:gaf. One micro-gradient")
def test_streaming_is_stacking(digits: Batch, policy: Any, k: int) -> None:
    model = conv_net()
    other = copy.deepcopy(model)
    found = []
    for net, rule in ((model, policy), (other, stacked(policy))):
        acc = gaf.Accumulator(SGD(net.parameters(), 0.1), rule)
        for x, y in micro_batches(digits, k):
            acc.backward(cross_entropy(net(x), y))
        found.append(acc.decide())
    a, b = found
    assert torch.equal(a.accepted, b.accepted)
    assert torch.equal(a.weights, b.weights)
    # <s, g> of float32 sums of k rows against float64 inner products: a few roundings of 2^-24
    torch.testing.assert_close(a.distances, b.distances, rtol=0, atol=1e-6, equal_nan=True)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            largest = k * p.grad.abs().max().item()
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=8 * 2**-24 * largest)


@given(st.data())
@pytest.mark.filterwarnings("ignore:gaf. One micro-gradient")
def test_streaming_stacking_and_aggregate_agree_on_rows_with_holes(data: st.DataObject) -> None:
    """Small integers, so that every tie and every cancelled sum is exact.

    Some parameters have no gradient, and some rows are not finite.
    """
    k, sizes = data.draw(st.integers(1, 5)), (1, 2, 3)
    entry = st.integers(-2, 2).map(float) | st.sampled_from([0.0, math.nan, math.inf])
    parts = [st.none() | st.lists(entry, min_size=n, max_size=n) for n in sizes]
    rows = [[data.draw(part) for part in parts] for _ in range(k)]
    # a loss must depend on something
    rows = [[[1.0], None, None] if row == [None] * 3 else row for row in rows]
    tau = data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]))
    policy = gaf.GAF(
        tau,
        average=data.draw(st.sampled_from(["mean", "halving"])),
        min_accepted=data.draw(st.integers(1, 3)),
    )
    filled = [[part or [0.0] * n for part, n in zip(row, sizes, strict=True)] for row in rows]
    whole = torch.tensor([[x for part in row for x in part] for row in filled])
    update, want = gaf.aggregate(whole, policy)
    for rule in (policy, stacked(policy)):
        params = [vector(n) for n in sizes]
        acc = gaf.Accumulator(SGD(params, 0.1), rule)
        for row in rows:
            terms = [(p, part) for p, part in zip(params, row, strict=True) if part is not None]
            acc.backward(sum((p * torch.tensor(part)).sum() for p, part in terms))
        found = acc.decide()
        assert found.accepted.tolist() == want.accepted.tolist()
        assert found.weights.tolist() == want.weights.tolist()
        # integers: float64 roundings
        torch.testing.assert_close(
            found.distances, want.distances, rtol=0, atol=1e-12, equal_nan=True
        )
        for i, (p, part) in enumerate(zip(params, update.split(sizes), strict=True)):
            taken = [row for row, joins in zip(rows, want.accepted, strict=True) if joins]
            has_gradient = any(row[i] is not None for row in taken)
            assert (p.grad is not None) == has_gradient
            if has_gradient:
                # thirds of integers in float32
                torch.testing.assert_close(p.grad, part, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [gaf.Mean(), stacked(gaf.Mean())], ids=["streamed", "stacked"])
def test_mean_is_plain_gradient_accumulation(digits: Batch, rule: Any) -> None:
    model = conv_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), rule)
    batches = micro_batches(digits, 5)
    want = micro_gradients(model, batches)
    for x, y in batches:
        acc.backward(cross_entropy(model(x), y))
    acc.decide()
    close_to_sum(flat_grad(model), want.mean(0), want)


@pytest.mark.parametrize("rule", [gaf.Mean(), stacked(gaf.Mean())], ids=["streamed", "stacked"])
def test_mean_lets_a_nan_through_as_plain_averaging_does(rule: Any) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), rule)
    feed(acc, p, [[1.0, 1.0], [math.nan, 3.0]])
    assert acc.decide().stepped
    assert p.grad.isnan().tolist() == [True, False]
    assert p.grad[1] == 2


@pytest.mark.parametrize("start", ["best", "worst"])
def test_other_starts_choose_among_all_rows(start: str) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(0.5, start=start))
    rows = [[-1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-1.0, 0.01]]
    feed(acc, p, rows)
    update, decision = gaf.aggregate(torch.tensor(rows), gaf.GAF(0.5, start=start))
    assert acc.decide().accepted.tolist() == decision.accepted.tolist()
    torch.testing.assert_close(p.grad, update, rtol=0, atol=2**-23)  # three float32 terms of size 1


def test_clipping_between_decide_and_step_clips_the_update() -> None:
    p, q = vector(), vector()
    acc, plain = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5)), SGD([q], 0.1)
    feed(acc, p, [[300.0, 400.0], [300.0, 400.0]])
    acc.decide()
    # the mean is exact; the norm float32
    assert nn.utils.clip_grad_norm_([p], 5.0).item() == pytest.approx(500.0)
    q.grad = p.grad.clone()
    acc.step()
    plain.step()
    assert torch.equal(p, q)
    # clip_grad_norm_ adds 1e-6 to the norm
    torch.testing.assert_close(q.grad, torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)


def test_an_incomplete_last_macro_batch_is_decided_on_the_rows_it_has(digits: Batch) -> None:
    model = mlp()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.0), gaf.GAF(2.0))
    for k in (4, 3):
        batches = micro_batches(digits, k)
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        assert acc.decide().weights.tolist() == [1 / k] * k
        rows = micro_gradients(model, batches)
        close_to_sum(flat_grad(model), rows.mean(0), rows)
        acc.step()


def test_a_single_leftover_micro_batch_steps_as_plain_training_and_warns_once() -> None:
    p, q = vector(), vector()
    acc, plain = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5)), SGD([q], 0.1)
    feed(acc, p, [[3.0, 4.0]])
    with pytest.warns(UserWarning, match="One micro-gradient has nothing to agree with") as caught:
        assert acc.step().stepped
    assert len(caught) == 1
    q.grad = torch.tensor([3.0, 4.0])
    plain.step()
    assert torch.equal(p, q)
    feed(acc, p, [[3.0, 4.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acc.step()


def test_a_single_absent_micro_batch_does_not_claim_to_have_been_stepped_on() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, [[0.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not acc.step().stepped


def test_a_gan_trains_with_two_accumulators_and_neither_leaks_into_the_other() -> None:
    generator, discriminator = (
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)),
    )
    g_rows, d_rows = [], []
    acc_g = gaf.Accumulator(SGD(generator.parameters(), 0.1), gaf.GAF(2.0))
    acc_d = gaf.Accumulator(SGD(discriminator.parameters(), 0.1), gaf.GAF(2.0))
    for _ in range(3):
        fake, real = generator(torch.randn(5, 3)), torch.randn(5, 2)
        d_loss = discriminator(fake).mean() - discriminator(real).mean()
        g_loss = -discriminator(fake).mean()
        d_rows.append(
            torch.autograd.grad(d_loss, list(discriminator.parameters()), retain_graph=True)
        )
        g_rows.append(torch.autograd.grad(g_loss, list(generator.parameters()), retain_graph=True))
        acc_d.backward(d_loss, retain_graph=True)
        acc_g.backward(g_loss)
        assert all(p.grad is None for p in [*generator.parameters(), *discriminator.parameters()])
    before = copy.deepcopy(generator.state_dict())
    acc_d.decide()
    assert all(p.grad is None for p in generator.parameters())
    for p, *rows in zip(discriminator.parameters(), *d_rows, strict=True):
        # float32 means of numbers of size 1
        torch.testing.assert_close(p.grad, torch.stack(rows).mean(0), rtol=0, atol=1e-6)
    acc_d.step()
    assert same(before, generator.state_dict())
    acc_g.decide()
    assert all(p.grad is None for p in discriminator.parameters())
    for p, *rows in zip(generator.parameters(), *g_rows, strict=True):
        torch.testing.assert_close(p.grad, torch.stack(rows).mean(0), rtol=0, atol=1e-6)  # as above


def test_tied_weights_get_one_gradient(digits: Batch) -> None:
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64, bias=False),
        nn.Tanh(),
        nn.Linear(64, 64, bias=False),
        nn.Linear(64, 10),
    )
    model[3].weight = model[1].weight
    batches = micro_batches(digits, 3)
    rows = micro_gradients(model, batches)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0))
    for x, y in batches:
        acc.backward(cross_entropy(model(x), y))
    acc.decide()
    close_to_sum(flat_grad(model), rows.mean(0), rows)


@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("policy", ["gaf", "mean"])
def test_the_sum_for_accelerators_decides_and_updates_as_the_one_for_cpus(
    policy: str, average: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows through both, on the CPU: one row is NaN, and some skip a parameter."""
    made = gaf.Mean() if policy == "mean" else gaf.GAF(0.9, average=average)
    bad = [] if policy == "mean" else [1]
    generator = torch.Generator().manual_seed(0)
    found = []
    rows = [
        (torch.randn(5, generator=generator) + 1, torch.randn(3, generator=generator) + 0.5)
        for _ in range(6)
    ]
    for device in (False, True):
        with monkeypatch.context() as patch:
            if device:
                patch.setattr("gaf.device.accumulate.rows_for", rows_without_waiting)
            p, q = vector(5), vector(3)
            acc = gaf.Accumulator(SGD([p, q], 0.1), made)
            for _ in range(3):
                for i, (a, b) in enumerate(rows):
                    factor = math.nan if i in bad else 1.0
                    acc.backward(factor * (p * a).sum() + (0 if i in (0, 3) else (q * b).sum()))
                decision = acc.step()
            found.append((decision, p.detach(), q.detach(), acc.stats()))
    (one, p, q, stats), (other, r, s, others) = found
    assert one.accepted.tolist() == other.accepted.tolist()
    assert bool(one.stepped)
    # float32 products against float64
    torch.testing.assert_close(one.distances, other.distances, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(q, s, rtol=1e-6, atol=1e-7)
    assert stats == pytest.approx(others, rel=1e-4, nan_ok=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("average", ["mean", "halving"])
@ENGINES
def test_a_gpu_decides_and_updates_as_the_cpu_does(average: str, wrap: Callable) -> None:
    rows = torch.randn(6, 200).add(0.3)
    rows[2] = math.nan
    p = nn.Parameter(torch.zeros(200, device="cuda"))
    acc = gaf.Accumulator(SGD([p], 1.0), wrap(gaf.GAF(0.9, average=average)))
    rows = rows.cuda()
    losses = [(p * row).sum() for row in rows]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            acc.backward(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    update, decision = gaf.aggregate(rows.cpu(), gaf.GAF(0.9, average=average))
    assert acc.decide().accepted.tolist() == decision.accepted.tolist()
    # float32 sums of six numbers of size 1
    torch.testing.assert_close(p.grad.cpu(), update, rtol=0, atol=1e-5)
