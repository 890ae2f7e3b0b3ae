"""gaf.Accumulator: the update against the paper's algorithm on separately computed micro-gradients, and what a skip leaves alone."""

import copy
import gc
import io
import json
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.checkpoint import checkpoint

import gaf
from gaf.device.batchnorm import BatchNormStatistics
from gaf.device.sums import SumOnDevice

BATCH = 12
Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------- problems and helpers


@pytest.fixture(scope="module")
def digits() -> Batch:
    """The 8 x 8 digits, 40% of the labels replaced."""
    data = load_digits()
    rng = torch.Generator().manual_seed(1)
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    flipped = torch.rand(len(y), generator=rng) < 0.4
    return x, torch.where(flipped, torch.randint(10, y.shape, generator=rng), y)


def micro_batches(digits: Batch, k: int, macro: int = 0) -> list[Batch]:
    x, y = digits
    first = macro * k * BATCH
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(first, first + k * BATCH, BATCH)]


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).to(dtype)


NETS = {"conv and batch norm": conv_net, "mlp": mlp}


def micro_gradients(model: nn.Module, batches: Sequence[Batch], scale: float = 1.0) -> Tensor:
    """Each on a copy, so that no state is shared: (k, n) in float64."""
    rows = []
    for x, y in batches:
        twin = copy.deepcopy(model)
        grads = torch.autograd.grad(
            scale * cross_entropy(twin(x).float(), y), list(twin.parameters())
        )
        rows.append(torch.cat([g.double().reshape(-1) / scale for g in grads]))
    return torch.stack(rows)


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat(
        [p.grad.double().reshape(-1) for p in model.parameters() if p.grad is not None]
    )


def a_telling_tau(rows: Tensor) -> float:
    """A threshold by which some rows are accepted and, for k > 2, some are not, and none is near enough for rounding to decide."""
    found = []
    for tau in torch.linspace(0.02, 1.5, 75).tolist():
        decision = gaf.GAF(tau)(gaf.gram(rows))
        margin = (decision.distances[1:] - tau).abs().min().item()
        mixed = 2 <= decision.accepted.sum() < len(rows)
        found.append((mixed, decision.stepped.item(), margin, tau))
    _, stepped, margin, tau = max(found)
    assert stepped
    assert margin > 1e-4  # float32 inner products are good to 1e-5
    return tau


def vector(n: int = 2, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(n, dtype=dtype))


def feed(acc: gaf.Accumulator, p: nn.Parameter, rows: Sequence[Sequence[float]]) -> None:
    """Micro-gradients as they are given: the loss is <p, row>."""
    for row in rows:
        acc.backward((p * torch.as_tensor(row, dtype=p.dtype)).sum())


AGREE, DISAGREE = [[1.0, 0.5], [1.0, 0.0]], [[1.0, 0.5], [-1.0, 0.0]]


def state_of(optimizer: Optimizer) -> dict:
    return copy.deepcopy(optimizer.state_dict()["state"])


def same(a: Any, b: Any) -> bool:
    """Bitwise, through nested containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def stacked(policy: Callable) -> Callable:
    """The same policy, but a plain callable: the Accumulator keeps the rows apart and hands it their Gram matrix."""
    return lambda gram: policy(gram)


# -------------------------------------------------------------------------------------- the update is the paper's


@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("net", NETS)
def test_the_gradient_after_decide_is_the_papers_update(
    digits: Batch, net: str, k: int, average: str
) -> None:
    """Over three macro-batches with steps between them, on separately computed micro-gradients in float64."""
    model = NETS[net]()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    for macro in range(3):
        batches = micro_batches(digits, k, macro)
        rows = micro_gradients(model, batches)
        tau = a_telling_tau(rows)
        acc = gaf.Accumulator(optimizer, gaf.GAF(tau, average=average))
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        decision = acc.decide()
        want, accepted = gaf.reference(rows, tau, average)
        assert decision.accepted.tolist() == accepted
        assert want is not None
        # Sums of at most eight float32 gradients: eight roundings of 2^-24 of the largest.
        torch.testing.assert_close(
            flat_grad(model), want, rtol=0, atol=8 * 2**-24 * rows.abs().max().item()
        )
        acc.step()


def test_the_problems_above_have_accepted_and_rejected_rows(digits: Batch) -> None:
    rows = micro_gradients(conv_net(), micro_batches(digits, 8))
    _, accepted = gaf.reference(rows, a_telling_tau(rows))
    assert 2 <= sum(accepted) < 8


POLICIES = [
    gaf.GAF(0.55), gaf.GAF(0.55, average="halving"), gaf.GAF(0.0), gaf.GAF(2.0), gaf.GAF(0.55, min_accepted=4), gaf.Mean(),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
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
    # <s, g> of float32 sums of k rows against sums of float64 inner products: a few roundings of 2^-24
    torch.testing.assert_close(a.distances, b.distances, rtol=0, atol=1e-6, equal_nan=True)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            # roundings of k terms
            torch.testing.assert_close(
                p.grad, q.grad, rtol=0, atol=8 * 2**-24 * p.grad.abs().max().item() * k
            )


@given(st.data())
@pytest.mark.filterwarnings("ignore:gaf. One micro-gradient")
def test_streaming_stacking_and_aggregate_agree_on_rows_with_holes(data: st.DataObject) -> None:
    """Small integers, so that every tie and every cancelled sum is exact; parameters without a gradient, rows that are not finite."""
    k, sizes = data.draw(st.integers(1, 5)), (1, 2, 3)
    entry = st.integers(-2, 2).map(float) | st.sampled_from([0.0, math.nan])
    rows = [
        [data.draw(st.none() | st.lists(entry, min_size=n, max_size=n)) for n in sizes]
        for _ in range(k)
    ]
    # a loss must depend on something
    rows = [[[1.0], None, None] if row == [None] * 3 else row for row in rows]
    tau = data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]))
    policy = gaf.GAF(
        tau,
        average=data.draw(st.sampled_from(["mean", "halving"])),
        min_accepted=data.draw(st.integers(1, 3)),
    )
    whole = torch.tensor(
        [[x for part, n in zip(row, sizes, strict=True) for x in part or [0.0] * n] for row in rows]
    )
    update, want = gaf.aggregate(whole, policy)
    for rule in (policy, stacked(policy)):
        params = [vector(n) for n in sizes]
        acc = gaf.Accumulator(SGD(params, 0.1), rule)
        for row in rows:
            acc.backward(
                sum(
                    (p * torch.tensor(part)).sum()
                    for p, part in zip(params, row, strict=True)
                    if part is not None
                )
            )
        found = acc.decide()
        assert found.accepted.tolist() == want.accepted.tolist()
        assert found.weights.tolist() == want.weights.tolist()
        # integers: float64 roundings
        torch.testing.assert_close(
            found.distances, want.distances, rtol=0, atol=1e-12, equal_nan=True
        )
        for i, (p, part) in enumerate(zip(params, update.split(sizes), strict=True)):
            held = any(
                taken and row[i] is not None for taken, row in zip(want.accepted, rows, strict=True)
            )
            assert (p.grad is not None) == held
            if held:
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
    # as above
    torch.testing.assert_close(
        flat_grad(model), want.mean(0), rtol=0, atol=8 * 2**-24 * want.abs().max().item()
    )


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


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_absent_micro_gradient_leaves_no_trace(
    bad: float, wrap: Callable, average: str, place: int
) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), wrap(gaf.GAF(0.5, average=average)))
    rows = [[8.0, 0.0], [16.0, 0.0], [32.0, 0.0]]
    rows.insert(place, [bad, 0.0])
    feed(acc, p, rows)
    decision = acc.decide()
    assert decision.accepted.tolist() == [i != place for i in range(4)]
    # ((8 + 16) / 2 + 32) / 2
    assert p.grad.tolist() == [pytest.approx(56 / 3) if average == "mean" else 22.0, 0.0]


def test_retain_graph_lets_a_graph_be_used_again() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(2.0))
    loss = (p * p).sum()
    acc.backward(loss, retain_graph=True)
    acc.backward(loss)
    acc.decide()
    assert p.grad.tolist() == [2.0, 2.0]


def test_deciding_twice_is_deciding_once_and_step_returns_the_same() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, AGREE)
    decision = acc.decide()
    grad = p.grad.clone()
    assert acc.decide() is decision
    assert torch.equal(p.grad, grad)
    assert acc.step() is decision
    assert acc.last is decision


@pytest.mark.parametrize("rows", [AGREE, DISAGREE], ids=["stepped", "skipped"])
def test_after_a_step_every_gradient_is_none(rows: list) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, rows)
    acc.step()
    assert p.grad is None


# --------------------------------------------------------------------------------------------------- every optimizer


def dense_optimizers() -> dict[str, type[Optimizer]]:
    kinds = {
        n: c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, Optimizer)
    }
    return {n: c for n, c in kinds.items() if n not in ("Optimizer", "LBFGS", "SparseAdam")}


# Whatever makes an optimizer move on a zero gradient is set: weight decay, momentum.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "Adam": [{"weight_decay": 0.1}, {"amsgrad": True}],
    "AdamW": [{"weight_decay": 0.1}, {"amsgrad": True}],
    "Adamax": [{"weight_decay": 0.1}],
    "NAdam": [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1}],
    "Adagrad": [{"weight_decay": 0.1, "lr_decay": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "RMSprop": [{"weight_decay": 0.1, "momentum": 0.9, "centered": True}],
    "Rprop": [{}],
    "ASGD": [{"weight_decay": 0.1}],
    "Adafactor": [{"weight_decay": 0.1}],
    "Muon": [{"weight_decay": 0.1}],
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


def optimizer_cases() -> Iterator[Any]:
    for name, variants in VARIANTS.items():
        for options in variants:
            for mode in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
                if ("fused" in mode and name not in FUSED) or (
                    "foreach" in mode and name == "Muon"
                ):
                    continue
                yield pytest.param(
                    name,
                    options | mode,
                    id="-".join([name, *options, *(f"{key}={v}" for key, v in mode.items())]),
                )


def test_every_dense_optimizer_of_torch_is_among_the_cases() -> None:
    assert set(VARIANTS) >= set(dense_optimizers())


@pytest.mark.parametrize(("name", "options"), list(optimizer_cases()))
def test_an_optimizer_steps_as_it_would_by_itself_and_does_nothing_on_a_skip(
    name: str, options: dict[str, Any]
) -> None:
    """Bitwise: parameters and state. A skip comes first, before the optimizer has any state, and again between steps."""
    if name not in dense_optimizers():
        pytest.skip(f"this torch has no {name}")
    p = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 2))]
    q = copy.deepcopy(p)
    optimizer, plain = (dense_optimizers()[name](params, lr=0.1, **options) for params in (p, q))
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    initial = state_of(optimizer)  # Adagrad fills its own at once
    for agree in (False, True, False, True, True):
        direction = [torch.randn_like(x) for x in p]
        for sign in (1.0, 0.25 if agree else -1.0):
            acc.backward(sum((sign * d * x).sum() for d, x in zip(direction, p, strict=True)))
        before, state = [x.detach().clone() for x in p], state_of(optimizer)
        assert acc.decide().stepped == agree
        for x, y in zip(p, q, strict=True):
            y.grad = None if x.grad is None else x.grad.clone()
        acc.step()
        if agree:
            plain.step()
            assert not same(before, [x.detach() for x in p])
        else:
            assert same(before, [x.detach() for x in p])
            assert same(state, state_of(optimizer))
        assert same([x.detach() for x in p], [y.detach() for y in q])
        assert same(state_of(optimizer), state_of(plain))
        plain.zero_grad()
    assert not same(initial, state_of(optimizer)) or not state_of(optimizer)  # plain SGD keeps none


def test_a_training_run_is_the_plain_one_bit_by_bit_where_everything_is_accepted(
    digits: Batch,
) -> None:
    """Two micro-batches: s = g_1 + g_2 is one rounding, and halving it is exact, as dividing both losses by two is."""
    model = conv_net()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, twin))
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    for macro in range(4):
        for x, y in micro_batches(digits, 2, macro):
            acc.backward(cross_entropy(model(x), y))
            (cross_entropy(twin(x), y) / 2).backward()
        acc.step()
        plain.step()
        plain.zero_grad()
    assert same(model.state_dict(), twin.state_dict())
    assert same(state_of(optimizer), state_of(plain))


# -------------------------------------------------------------------------------------- what a step takes into account


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
        # float32 sums
        torch.testing.assert_close(
            flat_grad(model), rows.mean(0), rtol=0, atol=8 * 2**-24 * rows.abs().max().item()
        )
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


def test_several_optimizers_share_one_decision() -> None:
    """Each half agrees or disagrees by itself; together the longer one decides."""
    p, q = vector(), vector()
    first, second = SGD([p], 0.125), torch.optim.Adam([q], 0.1)
    acc = gaf.Accumulator([first, second], gaf.GAF(0.5))
    for sign in (1.0, -1.0):  # p agrees at length 10, q disagrees at length 1
        acc.backward(
            (p * torch.tensor([10.0, 0.0])).sum() + sign * (q * torch.tensor([1.0, 0.0])).sum()
        )
    decision = acc.step()
    assert decision.stepped
    # float32 inner products
    assert decision.distances[1].item() == pytest.approx(1 - 99 / 101, abs=1e-6)
    assert p.tolist() == [-0.25, 1.0]
    assert q.tolist() == [1.0, 1.0]  # the mean of q's gradients is zero, and Adam moves by nothing
    before = p.detach().clone(), state_of(second)
    for sign in (1.0, -1.0):  # now p disagrees at length 10
        acc.backward(
            sign * (p * torch.tensor([10.0, 0.0])).sum() + (q * torch.tensor([1.0, 0.0])).sum()
        )
    assert not acc.step().stepped
    assert torch.equal(p, before[0])
    assert same(state_of(second), before[1])


def test_parameter_groups_keep_their_own_settings(digits: Batch) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    groups = [
        [
            {"params": m[1].parameters(), "lr": 0.5},
            {"params": m[3].parameters(), "weight_decay": 0.1},
        ]
        for m in (model, twin)
    ]
    optimizer, plain = (SGD(g, 0.01, momentum=0.9) for g in groups)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    for macro in range(3):
        for x, y in micro_batches(digits, 2, macro):
            acc.backward(cross_entropy(model(x), y))
        acc.decide()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        acc.step()
        plain.step()
    assert same(model.state_dict(), twin.state_dict())


def test_frozen_parameters_stay_until_they_are_thawed(digits: Batch) -> None:
    model = mlp()
    model[1].requires_grad_(False)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1, weight_decay=0.1), gaf.GAF(2.0))
    frozen = copy.deepcopy(model[1].state_dict())
    for macro in range(3):
        if macro == 1:
            model[1].requires_grad_(True)
        if macro == 2:
            model[1].requires_grad_(False)
            frozen = copy.deepcopy(model[1].state_dict())
        for x, y in micro_batches(digits, 2, macro):
            acc.backward(cross_entropy(model(x), y))
        acc.decide()
        assert (model[1].weight.grad is not None) == (macro == 1)
        acc.step()
        assert same(frozen, model[1].state_dict()) == (macro != 1)


def test_a_group_added_later_takes_part_from_the_next_macro_batch_on() -> None:
    p, q = vector(), vector()
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    feed(acc, p, AGREE)
    acc.step()
    optimizer.add_param_group({"params": [q]})
    for _ in range(2):
        acc.backward(p.sum() + 3 * q.sum())
    acc.decide()
    assert p.grad.tolist() == [1, 1]
    assert q.grad.tolist() == [3, 3]


def test_a_parameter_put_in_anothers_place_takes_over() -> None:
    p, q, other = vector(), vector(), vector()
    optimizer = SGD([p, other], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0), leave_out=lambda name, _: name == "1 of group 0")
    feed(acc, p, DISAGREE)
    acc.step()
    optimizer.param_groups[0]["params"] = [q, other]
    feed(acc, q, AGREE)
    acc.decide()
    assert q.grad.tolist() == [1, 0.25]
    assert p.grad is None


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
def test_a_parameter_without_a_gradient_is_not_touched(wrap: Callable) -> None:
    """Weight decay and momentum would move it on a gradient of zeros. So it is, too, where only rejected rows had one."""
    p, unused, rejected, half = vector(), vector(), vector(), vector()
    acc = gaf.Accumulator(
        SGD([p, unused, rejected, half], 0.1, momentum=0.9, weight_decay=0.1), wrap(gaf.GAF(0.5))
    )
    for _ in range(3):
        acc.backward(10 * p.sum())
        acc.backward(-10 * p.sum() + rejected.sum())
        acc.backward(10 * p.sum() + half.sum())
        assert acc.decide().accepted.tolist() == [True, False, True]
        assert unused.grad is None
        assert rejected.grad is None
        assert half.grad.tolist() == [0.5, 0.5]  # None counts as zeros in the mean
        acc.step()
    assert unused.tolist() == rejected.tolist() == [1, 1]
    assert p[0] < 0
    assert half[0] < 1


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
def test_halving_counts_a_missing_gradient_as_zeros(wrap: Callable) -> None:
    p, early, late = vector(), vector(), vector()
    acc = gaf.Accumulator(SGD([p, early, late], 0.1), wrap(gaf.GAF(0.5, average="halving")))
    acc.backward(10 * p.sum() + 8 * early.sum())
    acc.backward(10 * p.sum())
    acc.backward(10 * p.sum() + 8 * late.sum())
    assert acc.decide().weights.tolist() == [0.25, 0.25, 0.5]
    assert [t.grad[0].item() for t in (p, early, late)] == [10, 2, 4]


def test_a_gradient_that_is_exactly_zero_is_not_a_missing_one() -> None:
    """Also the second time, when the buffer of an earlier micro-gradient is lent to autograd."""
    p, zero = vector(), vector()
    acc = gaf.Accumulator(SGD([p, zero], 0.1, weight_decay=1.0), gaf.GAF(2.0))
    for _ in range(3):
        before = zero.detach().clone()
        for _ in range(3):
            acc.backward(p.sum() + 0 * zero.sum())
        acc.decide()
        assert zero.grad.tolist() == [0, 0]
        acc.step()
        assert (zero < before).all()  # weight decay


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
    # float32 sums
    torch.testing.assert_close(
        flat_grad(model), rows.mean(0), rtol=0, atol=8 * 2**-24 * rows.abs().max().item()
    )


def test_channels_last_parameters_and_their_gradients_are_read_alike(digits: Batch) -> None:
    model = conv_net().to(memory_format=torch.channels_last)
    batches = [
        (x.contiguous(memory_format=torch.channels_last), y) for x, y in micro_batches(digits, 4)
    ]
    rows = micro_gradients(model, batches)
    tau = a_telling_tau(rows)
    for rule in (gaf.GAF(tau), stacked(gaf.GAF(tau))):
        acc = gaf.Accumulator(SGD(model.parameters(), 0.0), rule)
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        want, accepted = gaf.reference(rows, tau)
        assert acc.decide().accepted.tolist() == accepted
        # float32 sums
        torch.testing.assert_close(
            flat_grad(model), want, rtol=0, atol=8 * 2**-24 * rows.abs().max().item()
        )
        acc.step()


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes_are_decided_and_updated_alike(
    digits: Batch, dtype: torch.dtype, wrap: Callable
) -> None:
    model = mlp(dtype)
    batches = [(x.to(dtype), y) for x, y in micro_batches(digits, 4)]
    rows = micro_gradients(model, batches)
    tau = a_telling_tau(rows)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), wrap(gaf.GAF(tau)))
    for x, y in batches:
        acc.backward(cross_entropy(model(x).float(), y))
    want, accepted = gaf.reference(rows, tau)
    assert acc.decide().accepted.tolist() == accepted
    assert all(p.grad.dtype == dtype for p in model.parameters())
    # At most four roundings, each half a unit in the last place, of sums of at most four of the largest entry.
    torch.testing.assert_close(
        flat_grad(model), want, rtol=0, atol=8 * torch.finfo(dtype).eps * rows.abs().max().item()
    )
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


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
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


# --------------------------------------------------------------------------------------------------------- GradScaler


def scaler(**kwargs: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, **kwargs)


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_update_under_autocast_and_a_scaler_is_unscaled(
    digits: Batch, dtype: torch.dtype, wrap: Callable
) -> None:
    model = mlp()
    amp, batches = scaler(), micro_batches(digits, 4)
    with torch.autocast("cpu", dtype):
        rows = micro_gradients(model, batches, scale=amp.get_scale())
    tau = a_telling_tau(rows)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), wrap(gaf.GAF(tau)), scaler=amp)
    for x, y in batches:
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(x).float(), y)
        acc.backward(loss)
    want, accepted = gaf.reference(rows, tau)
    assert acc.decide().accepted.tolist() == accepted
    # The same half precision backward passes; the gradients that autocast hands out are float32, added as such.
    torch.testing.assert_close(
        flat_grad(model), want, rtol=0, atol=8 * 2**-24 * rows.abs().max().item()
    )
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
]  # fmt: skip


@pytest.mark.parametrize("make", SCALED_OPTIMIZERS, ids=["SGD", "AdamW", "fused AdamW"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_overflow_in_one_micro_batch_stops_the_step_and_the_scale_falls(
    make: Callable, bad: float, place: int
) -> None:
    p = vector()
    optimizer, amp = make([p]), scaler(backoff_factor=0.25)
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
    """The scale stays, the growth tracker counts, and after growth_interval of them the scale grows."""
    p = vector()
    optimizer, amp = make([p]), scaler(growth_interval=3)
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
    amp, plain_amp = scaler(growth_interval=2), scaler(growth_interval=2)
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
    amp = scaler()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5), scaler=amp)
    feed(acc, p, [*DISAGREE, [math.inf, 0.0]])
    assert not acc.step().stepped
    assert amp.get_scale() == 2.0**9


@pytest.mark.parametrize(
    "policy", [gaf.Mean(), gaf.RandomSkip(1.0), gaf.GAF(2.0, start="best")], ids=repr
)
def test_no_policy_steps_on_an_overflow(policy: Any) -> None:
    p = vector()
    amp = scaler()
    acc = gaf.Accumulator(SGD([p], 0.1), policy, scaler=amp)
    feed(acc, p, [[1.0, 1.0], [math.nan, 1.0]])
    assert not acc.step().stepped
    assert p.tolist() == [1, 1]
    assert amp.get_scale() == 2.0**9


def test_an_overflow_in_one_of_several_optimizers_stops_them_all() -> None:
    p, q, idle = vector(), vector(), vector()
    amp = scaler()
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
    """The scaler refuses float16 gradients; a frozen parameter of a fine-tuned model never has one."""
    frozen, p = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False), vector()
    acc = gaf.Accumulator(SGD([frozen, p], 0.1), gaf.GAF(0.5), scaler=scaler())
    feed(acc, p, AGREE)
    assert acc.step().stepped
    feed(acc, p, DISAGREE)
    assert not acc.step().stepped


def test_clipping_under_a_scaler_sees_unscaled_gradients() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5), scaler=scaler())
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


def test_a_scaler_serves_one_macro_batch_at_a_time() -> None:
    """One after the other, as a GAN's two players, two Accumulators may share it; at once, a step would change the other's scale."""
    p, q, amp = vector(), vector(), scaler()
    first, second = (gaf.Accumulator(SGD([v], 0.1), gaf.GAF(0.5), scaler=amp) for v in (p, q))
    for _ in range(2):
        feed(first, p, [[1.0, 0.0], [1.0, 0.0]])
        with pytest.raises(
            ValueError,
            match=r"scaler must serve one macro-batch at a time.*Call its step\(\) first",
        ):
            second.backward(q.sum())
        first.step()
        feed(second, q, [[0.0, 1.0], [0.0, 1.0]])
        second.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, 1.0]))
    torch.testing.assert_close(q.detach(), torch.tensor([1.0, 0.8]))


def test_a_copy_of_a_gated_scheduler_is_a_plain_one() -> None:
    p = vector()
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    gated = acc.gate(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert type(other) is torch.optim.lr_scheduler.StepLR
        assert other.state_dict() == gated.state_dict()


# ---------------------------------------------------------------------------------------------------------- leave_out


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
def test_leave_out_decides_on_the_rest_and_updates_all_with_the_same_weights(
    digits: Batch, wrap: Callable
) -> None:
    model = mlp()
    batches = micro_batches(digits, 6)
    rows = micro_gradients(model, batches)
    first = model[1].weight.numel() + model[1].bias.numel()
    tau = a_telling_tau(rows[:, first:])
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1),
        wrap(gaf.GAF(tau)),
        model=model,
        leave_out=lambda name, p: name.startswith("1.") and p.numel() > 0,
    )
    for x, y in batches:
        acc.backward(cross_entropy(model(x), y))
    decision = acc.decide()
    _, accepted = gaf.reference(rows[:, first:], tau)
    assert decision.accepted.tolist() == accepted
    assert 2 <= sum(accepted) < 6
    want = decision.weights @ rows
    # float32 sums
    torch.testing.assert_close(
        flat_grad(model), want, rtol=0, atol=8 * 2**-24 * rows.abs().max().item()
    )


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_left_out_parameter_that_is_not_finite_makes_its_row_absent(
    wrap: Callable, bad: float, place: int
) -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), wrap(gaf.GAF(0.5)), leave_out=lambda name, t: t is q)
    for i in range(3):
        acc.backward(p.sum() + (bad if i == place else 1.0) * q.sum())
    assert acc.decide().accepted.tolist() == [i != place for i in range(3)]
    assert q.grad.tolist() == [1, 1]


def test_a_left_out_parameter_of_any_finite_size_has_no_say() -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), gaf.GAF(0.5), leave_out=lambda name, t: t is q)
    for factor in (1e30, -1e30, 0.0):
        acc.backward(p.sum() + factor * q.sum())
    assert acc.step().accepted.tolist() == [True] * 3


def test_a_row_whose_deciding_part_is_zero_is_absent() -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), gaf.GAF(0.5), leave_out=lambda name, t: t is q)
    for factor in (0.0, 1.0, 1.0):
        acc.backward(factor * p.sum() + q.sum())
    assert acc.step().accepted.tolist() == [False, True, True]


def test_leave_out_may_not_leave_out_everything() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5), leave_out=lambda name, t: True)
    with pytest.raises(ValueError, match="leave_out must leave at least one parameter"):
        acc.backward(p.sum())


def test_names_are_the_models_or_the_places_in_the_optimizer() -> None:
    seen: list[str] = []
    model, extra = nn.Sequential(nn.Linear(2, 1)), vector()
    optimizers = [SGD(model.parameters(), 0.1), SGD([extra], 0.1)]
    for named in (model, None):
        acc = gaf.Accumulator(
            optimizers,
            gaf.GAF(2.0),
            model=named,
            leave_out=lambda name, t: seen.append(name) is None and t is extra,
        )
        acc.backward(model(torch.ones(1, 2)).sum() + extra.sum())
    assert seen == [
        "0.weight", "0.bias", "0 of group 0 of optimizer 1",
        "0 of group 0 of optimizer 0", "1 of group 0 of optimizer 0", "0 of group 0 of optimizer 1",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- schedulers

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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "tau", [lambda: 0.5, lambda: gaf.MovingAverageTau(0.05), lambda: gaf.NoiseFloorTau()]
)
def test_the_state_goes_through_torchs_distributed_checkpoint_into_a_new_run(
    tau: Callable[[], Any], tmp_path: Path
) -> None:
    """It takes dictionaries apart, and finds only what the new run's own state has a place for."""
    p = vector()
    acc, fresh = (gaf.Accumulator(SGD([p], 0.1), gaf.GAF(tau())) for _ in range(2))
    for rows in (AGREE, DISAGREE, AGREE):
        feed(acc, p, rows)
        acc.step()
    dcp.save({"gaf": acc.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    state = {"gaf": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(state["gaf"])
    assert fresh.state_dict() == acc.state_dict()
    assert fresh.stats()["steps"] == 3


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


# ---------------------------------------------------------------------------------------------------------- BatchNorm


def norm_state(model: nn.Module) -> list[Tensor]:
    return [
        b.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for b in m.buffers()
    ]


def with_momentum(model: nn.Module, momentum: float | None) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    return model


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_bn_accepted_has_the_statistics_of_a_model_that_saw_the_accepted_micro_batches_alone(
    digits: Batch, momentum: float | None
) -> None:
    """The other model is given the same parameters and only the accepted micro-batches, over macro-batches that step and that skip."""
    model = with_momentum(conv_net(), momentum)
    saw = copy.deepcopy(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(), model=model, bn="accepted")
    counts = []
    for macro in range(4):
        batches = micro_batches(digits, 5, macro)
        tau = 0.0 if macro == 2 else a_telling_tau(micro_gradients(model, batches))
        acc.policy = gaf.GAF(tau)
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        decision = acc.decide()
        counts.append(int(decision.accepted.sum()))
        with torch.no_grad():
            for p, q in zip(saw.parameters(), model.parameters(), strict=True):
                p.copy_(q)
            for (x, _), taken in zip(batches, decision.accepted, strict=True):
                if taken:
                    saw(x)
        acc.step()
        # Statistics of size 1 taken back and put on again: at most five moves a macro-batch, some float32 roundings each
        torch.testing.assert_close(norm_state(model), norm_state(saw), rtol=1e-5, atol=1e-6)
    assert counts[2] == 0
    assert all(counts[i] >= 2 for i in (0, 1, 3))
    assert min(counts[i] for i in (0, 1, 3)) < 5


def test_bn_accepted_leaves_the_statistics_bitwise_alone_on_a_skip(digits: Batch) -> None:
    model = conv_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.0), model=model, bn="accepted")
    before = norm_state(model)
    for x, y in micro_batches(digits, 3):
        acc.backward(cross_entropy(model(x), y))
        assert same(before, norm_state(model))  # also while the macro-batch is being collected
    assert not acc.step().stepped
    assert same(before, norm_state(model))


def test_bn_all_moves_with_every_micro_batch_as_plain_training_does(digits: Batch) -> None:
    model = conv_net()
    plain = copy.deepcopy(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.0), model=model)
    for x, y in micro_batches(digits, 3):
        acc.backward(cross_entropy(model(x), y))
        plain(x)
    assert not acc.step().stepped
    assert same(norm_state(model), norm_state(plain))


def test_bn_accepted_does_not_change_the_gradients(digits: Batch) -> None:
    """In training mode BatchNorm looks at the batch alone."""
    found = []
    model = conv_net()
    for bn in ("all", "accepted"):
        twin = copy.deepcopy(model)
        acc = gaf.Accumulator(SGD(twin.parameters(), 0.1), gaf.GAF(2.0), model=twin, bn=bn)
        for x, y in micro_batches(digits, 3):
            acc.backward(cross_entropy(twin(x), y))
        acc.decide()
        found.append(flat_grad(twin))
    assert torch.equal(*found)


def test_a_loaded_checkpoint_is_where_bn_accepted_goes_on_from(digits: Batch) -> None:
    model, other = conv_net(), conv_net()
    for x, _ in micro_batches(digits, 3):
        other(x)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.0), model=model, bn="accepted")
    model.load_state_dict(other.state_dict())
    for x, y in micro_batches(digits, 2):
        acc.backward(cross_entropy(model(x), y))
    acc.step()
    assert same(norm_state(model), norm_state(other))


def test_two_passes_a_micro_batch_are_two_moves(digits: Batch) -> None:
    """As in a discriminator, which sees the real and the fake pictures in turn."""
    for momentum in (0.1, None):
        model = with_momentum(conv_net(), momentum)
        saw = copy.deepcopy(model)
        acc = gaf.Accumulator(
            SGD(model.parameters(), 0.0), gaf.GAF(2.0), model=model, bn="accepted"
        )
        pairs = [micro_batches(digits, 2, macro) for macro in range(3)]
        for (a, y), (b, z) in pairs:
            acc.backward(cross_entropy(model(a), y) + cross_entropy(model(b), z))
            saw(a)
            saw(b)
        acc.step()
        # float32, as above
        torch.testing.assert_close(norm_state(model), norm_state(saw), rtol=1e-5, atol=1e-6)


def test_a_cumulative_batch_norm_that_was_not_used_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(2, momentum=None)
    statistics = BatchNormStatistics(norm)
    statistics.note()
    statistics.settle([True])
    assert norm.running_var.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------------------- errors


def test_backward_after_decide_is_refused() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, AGREE)
    acc.decide()
    with pytest.raises(
        RuntimeError, match=r"backward\(\) came after decide\(\); call step\(\) first"
    ):
        acc.backward(p.sum())
    assert acc.step().stepped
    feed(acc, p, AGREE)
    assert acc.step().stepped


def test_a_step_without_a_micro_gradient_is_refused() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    for call in (acc.step, acc.decide):
        with pytest.raises(RuntimeError, match=r"needs at least one backward\(\) before it"):
            call()
    feed(acc, p, AGREE)
    acc.step()
    with pytest.raises(RuntimeError, match="none since the last step"):
        acc.step()


@pytest.mark.parametrize("when", [0, 1])
def test_a_gradient_from_elsewhere_is_refused_by_the_parameters_name(when: int) -> None:
    model = nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model)
    for _ in range(when):
        acc.backward(model(torch.ones(1, 2)).sum())
    model.bias.grad = torch.zeros(1)
    with pytest.raises(
        RuntimeError, match="parameter 'bias' must have no gradient before backward"
    ):
        acc.backward(model(torch.ones(1, 2)).sum())
    model.zero_grad()
    for _ in range(2):
        acc.backward(model(torch.ones(1, 2)).sum())
    assert acc.step().weights.tolist() == [1 / (2 + when)] * (2 + when)


def test_a_sparse_gradient_is_refused_and_the_accumulator_can_be_used_further() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model)
    with pytest.raises(
        TypeError, match=r"gradients must be dense; that of 'weight' is torch.sparse_coo"
    ):
        acc.backward(model(torch.tensor([0, 1])).sum())
    assert model.weight.grad is None
    model.sparse = False
    for _ in range(2):
        acc.backward(model(torch.tensor([0, 1])).sum())
    acc.decide()
    assert model.weight.grad[:, 0].tolist() == [1, 1, 0, 0, 0]


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")


@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_exception_in_backward_loses_that_micro_batch_alone(wrap: Callable, place: int) -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), wrap(gaf.GAF(0.5)))
    for i in range(3):
        if i == place:
            with pytest.raises(ZeroDivisionError):
                acc.backward(7 * p.sum() + Fails.apply(q).sum())
        acc.backward((i + 1) * (p.sum() + q.sum()))
    assert acc.decide().weights.tolist() == [1 / 3] * 3
    assert p.grad.tolist() == q.grad.tolist() == [2, 2]


def test_a_reentrant_checkpoint_gives_its_gradients_or_is_refused() -> None:
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD([*inner.parameters(), *outer.parameters()], 0.1), gaf.GAF(2.0))
    try:
        for _ in range(2):
            acc.backward(
                outer(
                    checkpoint(inner, torch.ones(1, 2, requires_grad=True), use_reentrant=True)
                ).sum()
            )
    except RuntimeError as refusal:
        assert "use_reentrant=False" in str(refusal)  # noqa: PT017
    else:
        acc.decide()
        assert inner.weight.grad is not None


def test_a_checkpoint_that_is_not_reentrant_gives_its_gradients() -> None:
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD([*inner.parameters(), *outer.parameters()], 0.1), gaf.GAF(2.0))
    (want,) = torch.autograd.grad(outer(inner(torch.ones(1, 2))).sum(), inner.weight)
    for _ in range(2):
        acc.backward(
            outer(
                checkpoint(inner, torch.ones(1, 2, requires_grad=True), use_reentrant=False)
            ).sum()
        )
    acc.decide()
    assert torch.equal(inner.weight.grad, want)  # (g + g) / 2 is exact


def test_bn_accepted_forgets_a_micro_batch_whose_backward_failed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    saw = copy.deepcopy(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.0), gaf.GAF(2.0), model=model, bn="accepted")
    with pytest.raises(ZeroDivisionError):
        acc.backward(Fails.apply(model(torch.randn(4, 2) + 100)).sum())
    for _ in range(2):
        x = torch.randn(4, 2)
        acc.backward(model(x).pow(3).sum())
        saw(x)
    acc.step()
    assert model[0].num_batches_tracked == 2
    # float32, as above
    torch.testing.assert_close(model[0].running_mean, saw[0].running_mean, rtol=1e-5, atol=1e-6)


def test_after_a_failed_first_backward_step_says_what_is_missing() -> None:
    acc = gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5))
    with pytest.raises(RuntimeError, match="does not require grad"):
        acc.backward(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"needs at least one backward\(\) before it"):
        acc.step()


def test_after_a_failed_first_backward_the_state_can_be_taken() -> None:
    acc = gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5))
    with pytest.raises(RuntimeError, match="does not require grad"):
        acc.backward(torch.tensor(1.0))
    acc.state_dict()


def test_optimizers_that_cannot_be_filtered_are_refused() -> None:
    with pytest.raises(TypeError, match="must not need a closure; LBFGS"):
        gaf.Accumulator(torch.optim.LBFGS([vector()]), gaf.GAF(0.5))
    with pytest.raises(TypeError, match="must take dense gradients; got SparseAdam"):
        gaf.Accumulator([SGD([vector()], 0.1), torch.optim.SparseAdam([vector()])], gaf.GAF(0.5))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_optimizer_is_refused() -> None:
    for thing in ([vector()], ["SGD"], [SGD([vector()], 0.1), None]):
        with pytest.raises(
            TypeError, match=r"optimizer must be a torch.optim.Optimizer or a list of them; got"
        ):
            gaf.Accumulator(thing, gaf.GAF(0.5))


def test_a_parameter_may_not_be_in_two_optimizers_and_one_must_be_in_some() -> None:
    p = vector()
    with pytest.raises(
        ValueError, match=r"hold parameters, each of them once; got 2 entries with 1 parameters"
    ):
        gaf.Accumulator([SGD([p], 0.1), SGD([p], 0.1)], gaf.GAF(0.5))
    with pytest.raises(ValueError, match="got 0 entries"):
        gaf.Accumulator([], gaf.GAF(0.5))


def test_complex_parameters_are_refused_at_once_and_when_added_later() -> None:
    with pytest.raises(
        TypeError, match=r"parameters must be real; '0 of group 0' is torch.complex64"
    ):
        gaf.Accumulator(SGD([vector(2, torch.complex64)], 0.1), gaf.GAF(0.5))
    p = vector()
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    optimizer.add_param_group({"params": [vector(2, torch.complex64)]})
    with pytest.raises(TypeError, match=r"'0 of group 1' is torch.complex64"):
        acc.backward(p.sum())


def test_bn_must_be_a_known_word_and_accepted_needs_the_model() -> None:
    with pytest.raises(ValueError, match=r"bn='accepted' needs the model.*Pass model="):
        gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5), bn="accepted")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_bn_is_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="bn must be 'all' or 'accepted'; got 'none'"):
        gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5), bn="none")  # type: ignore[arg-type]


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_distributed_model_is_refused_and_pointed_to_attach() -> None:
    model = DistributedDataParallel(nn.Linear(2, 1))
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"model is a DistributedDataParallel.*gaf\.attach"):
        gaf.Accumulator(optimizer, gaf.GAF(0.5), model=model)
    for inner in (None, model.module):
        with pytest.raises(
            TypeError, match=r"parameters belong to a DistributedDataParallel model.*gaf\.attach"
        ):
            gaf.Accumulator(optimizer, gaf.GAF(0.5), model=inner)
    other = nn.Linear(2, 1)  # beside one that is distributed, another model is none of its business
    acc = gaf.Accumulator(SGD(other.parameters(), 0.1), gaf.GAF(2.0))
    for _ in range(2):
        acc.backward(other(torch.ones(1, 2)).sum())
    assert acc.step().stepped


@pytest.mark.usefixtures("one_process_group")
def test_a_model_distributed_after_the_accumulator_was_made_is_noticed_at_the_first_backward() -> (
    None
):
    model = nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.5))
    ddp = DistributedDataParallel(model)
    with pytest.raises(TypeError, match="belong to a DistributedDataParallel model"):
        acc.backward(ddp(torch.ones(1, 2)).sum())


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_parameter_is_refused_and_pointed_to_attach() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    p = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"'0 of group 0' is a DTensor.*gaf\.attach"):
        gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))


# --------------------------------------------------------------------------------------------------------- statistics


def test_stats_count_accepted_rejected_and_absent_rows() -> None:
    """On a skip nothing counts as accepted: the start, too, is then a rejected row."""
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    sequence = [
        ([[1, 0], [1, 0], [-1, 0], [0, 0]], (2, 1, 1)),
        ([[1, 0], [-1, 0]], (0, 2, 0)),
        ([[math.nan, 0], [math.inf, 0], [1, 0]], (0, 1, 2)),
        ([[0, 0], [1, 0], [0, 1], [1, 0]], (2, 1, 1)),
    ]
    steps = stepped = seen = 0
    counts = (0, 0, 0)
    for rows, moved in sequence:
        feed(acc, p, rows)
        stepped += bool(acc.step().stepped)
        steps, seen = steps + 1, seen + len(rows)
        counts = tuple(a + b for a, b in zip(counts, moved, strict=True))
        stats = acc.stats()
        assert (stats["steps"], stats["stepped"], stats["micro_gradients"]) == (
            steps,
            stepped,
            seen,
        )
        assert (stats["accepted"], stats["rejected"], stats["absent"]) == counts
    assert all(type(v) in (int, float) for v in stats.values())


def test_distances_and_norms_in_stats_are_those_of_the_rows_compared() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    # distances 0 (start), 1, none, 0
    feed(acc, p, [[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [3.0, 0.0]])
    acc.step()
    feed(acc, p, [[1.0, 0.0], [-1.0, 0.0]])  # 0 (start), 2
    acc.step()
    stats = acc.stats()
    assert stats["distance_mean"] == pytest.approx(1.0)  # of 1, 0 and 2
    assert stats["distance_min"] == 0
    # of 2, 1, 3, and of 1, 1; mean over the steps
    assert stats["norm_dispersion"] == pytest.approx(math.sqrt(2 / 3) / 2 / 2)


def test_stats_of_nothing_are_nan() -> None:
    stats = gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5)).stats()
    assert stats["steps"] == 0
    assert all(
        math.isnan(stats[key])
        for key in ("distance_mean", "distance_min", "norm_dispersion", "noise_scale")
    )


def noisy_run(policy: Any, steps: int = 100, k: int = 4, **kwargs: Any) -> gaf.Accumulator:
    """g_i = g + e_i with |g|^2 = 1 and E|e_i|^2 = 5, in 1000 dimensions: B = 5 in units of the micro-batch."""
    n, p = 1000, vector(1000)
    acc = gaf.Accumulator(SGD([p], 0.0), policy, **kwargs)
    for _ in range(steps):
        feed(acc, p, n**-0.5 + (5 / n) ** 0.5 * torch.randn(k, n))
        acc.step()
    return acc


# From 100 steps with six pairs each, |g|^2 = 1 is known to about sqrt((2 * 5 / 3 + 25 / 1000 / 6) / 100 / 1000), below 1%,
# where the streamed estimate uses three pairs a step; 10% is far out.
@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
@pytest.mark.parametrize(
    "policy", [gaf.GAF(2.0), gaf.Mean(), gaf.GAF(2.0, average="halving")], ids=repr
)
def test_the_noise_scale_is_found_within_sampling_error(policy: Any, wrap: Callable) -> None:
    acc = noisy_run(wrap(policy))
    assert acc.stats()["noise_scale"] == pytest.approx(5.0, rel=0.1)
    assert acc.stats(b=32)["noise_scale"] == pytest.approx(160.0, rel=0.1)


def test_the_noise_scale_does_not_see_a_gradscaler() -> None:
    acc = noisy_run(gaf.GAF(2.0), scaler=scaler(growth_interval=7))
    assert acc.stats()["noise_scale"] == pytest.approx(5.0, rel=0.1)  # as above


def test_the_noise_scale_of_pure_noise_is_large_or_infinite() -> None:
    p = vector(1000)
    acc = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(2.0))
    for _ in range(20):
        feed(acc, p, torch.randn(4, 1000))
        acc.step()
    # |g|^2 is 0 within 1 / sqrt(1000 * 60) of |e|^2: the ratio comes out above 100, or infinite where the estimate is negative
    assert acc.stats()["noise_scale"] > 50


def test_the_noise_scale_of_equal_gradients_is_zero() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    for _ in range(3):
        feed(acc, p, [[3.0, 4.0]] * 3)
        acc.step()
    assert acc.stats()["noise_scale"] == pytest.approx(0.0, abs=1e-6)  # float32 inner products


@pytest.mark.filterwarnings("ignore:gaf. One micro-gradient")
def test_steps_that_compare_nothing_do_not_move_the_noise_scale() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    for k in (2, 1, 2, 1):
        feed(acc, p, [[3.0, 4.0]] * k)
        acc.step()
    assert acc.stats()["noise_scale"] == pytest.approx(0.0, abs=1e-6)  # float32 inner products


def warned(acc: gaf.Accumulator, p: nn.Parameter, rows: list, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            feed(acc, p, rows)
            acc.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("start", ["first", "best"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (DISAGREE, "No micro-gradient was accepted in 100 steps"),
        (AGREE, "Every micro-gradient was accepted in 100 steps"),
    ],
)
def test_a_tau_that_never_or_always_accepts_is_told_once_after_100_steps(
    rows: list, message: str, start: str
) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(0.5, start=start))
    assert warned(acc, p, rows, 99) == []
    (found,) = warned(acc, p, rows, 1)
    assert message in found
    assert "tau = 0.5" in found
    assert warned(acc, p, rows, 150) == []


def test_one_row_accepted_and_one_rejected_in_100_steps_is_no_cause_for_a_warning() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(0.5))
    for rows in (AGREE, DISAGREE):
        for _ in range(3):
            assert warned(acc, p, rows, 50) == []
            assert warned(acc, p, DISAGREE if rows is AGREE else AGREE, 1) == []


@pytest.mark.parametrize(
    "policy", [gaf.Mean(), gaf.GAF(2.0), gaf.RandomSkip(0.0), gaf.RandomSkip(1.0)], ids=repr
)
@pytest.mark.parametrize("rows", [AGREE, DISAGREE], ids=["agree", "disagree"])
def test_policies_without_a_threshold_to_set_do_not_warn(policy: Any, rows: list) -> None:
    p = vector()
    assert warned(gaf.Accumulator(SGD([p], 0.0), policy), p, rows, 120) == []


def test_a_leftover_micro_batch_in_every_epoch_does_not_silence_the_warning() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(0.5))
    found: list[str] = []
    for _ in range(12):
        found += warned(acc, p, DISAGREE, 30) + warned(acc, p, [[1.0, 0.0]], 1)
    assert any("No micro-gradient was accepted" in message for message in found)


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("through", ["json", "torch.save"])
@pytest.mark.parametrize(
    "policy", [lambda: gaf.GAF(0.8), lambda: gaf.RandomSkip(0.5, seed=5)], ids=["GAF", "RandomSkip"]
)
def test_a_resumed_run_is_the_undisturbed_one(policy: Callable, through: str) -> None:
    rows = torch.randn(30, 3, 4).add(0.5)
    rows[4, 1] = math.nan
    p = vector(4)
    optimizer = SGD([p], 0.1, momentum=0.9)
    acc = gaf.Accumulator(optimizer, policy())
    for step, macro in enumerate(rows):
        if step == 13:
            state = acc.state_dict()
            if through == "json":
                state = json.loads(json.dumps(state))
            else:
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
            q = nn.Parameter(p.detach().clone())
            other_optimizer = SGD([q], 0.1, momentum=0.9)
            other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            other = gaf.Accumulator(other_optimizer, policy())
            other.load_state_dict(state)
            assert same(acc.stats(), other.stats())
        feed(acc, p, macro)
        decision = acc.step()
        if step >= 13:
            feed(other, q, macro)
            assert other.step().accepted.tolist() == decision.accepted.tolist()
    assert torch.equal(p, q)
    assert same(acc.stats(), other.stats())
    assert same(acc.state_dict(), other.state_dict())
    assert 0 < acc.stats()["stepped"] < 30


def test_a_warning_given_before_a_checkpoint_is_not_given_again_after_it() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(0.5))
    assert len(warned(acc, p, DISAGREE, 100)) == 1
    other = gaf.Accumulator(SGD([p], 0.0), gaf.GAF(0.5))
    other.load_state_dict(json.loads(json.dumps(acc.state_dict())))
    assert warned(other, p, DISAGREE, 100) == []


def test_the_state_is_a_copy() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    state = acc.state_dict()
    before = copy.deepcopy(state)
    feed(acc, p, AGREE)
    acc.step()
    assert same(state, before)


def test_the_state_cannot_be_taken_while_micro_gradients_wait() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, AGREE)
    with pytest.raises(
        RuntimeError, match=r"state_dict\(\) must come between macro-batches; micro-gradients wait"
    ):
        acc.state_dict()
    acc.decide()
    with pytest.raises(RuntimeError, match=r"micro-gradients wait and would be lost"):
        acc.state_dict()
    acc.step()
    acc.state_dict()


# ------------------------------------------------------------------------------------------------- memory, host, devices


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """gc.get_objects() then gives the test's own."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def gradient_sized_blocks(params: list[nn.Parameter]) -> int:
    """How many pieces of memory of a parameter's size are alive beside the parameters themselves."""
    n = params[0].numel()
    alive = {
        t.untyped_storage().data_ptr()
        for t in gc.get_objects()
        if issubclass(type(t), Tensor) and t.numel() == n
    }
    grads = {p.grad.untyped_storage().data_ptr() for p in params if p.grad is not None}
    return len((alive | grads) - {p.untyped_storage().data_ptr() for p in params})


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("k", [2, 5, 9])
@pytest.mark.parametrize("agree", [True, False])
def test_streaming_holds_at_most_two_gradients_whatever_k_and_stacking_holds_k(
    k: int, agree: bool
) -> None:
    """The running sum and one more, after each backward, after decide and after step."""
    params = [nn.Parameter(torch.zeros(1234)), nn.Parameter(torch.zeros(1234))]

    def most(rule: Any) -> float:
        acc, held = gaf.Accumulator(SGD(params, 0.1), rule), []
        for _ in range(2):
            for i in range(k):
                sign = 1.0 if agree or i % 2 == 0 else -1.0
                acc.backward(sum((sign * p).sum() * (i + 1) for p in params))
                held.append(gradient_sized_blocks(params))
            acc.decide()
            held.append(gradient_sized_blocks(params))
            acc.step()
            held.append(gradient_sized_blocks(params))
        return max(held) / len(params)

    assert most(gaf.GAF(0.5)) == 2
    assert most(gaf.GAF(0.5, average="halving")) == 2
    assert most(gaf.Mean()) == 2
    assert most(stacked(gaf.GAF(0.5))) >= k


def test_an_accumulator_keeps_no_graph_alive() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    for row in AGREE:
        loss = (p * torch.tensor(row)).sum()
        node = weakref.ref(loss)
        acc.backward(loss)
        del loss
        assert node() is None


@pytest.mark.parametrize(
    "policy", [gaf.GAF(0.5), gaf.GAF(0.5, average="halving"), gaf.Mean(), stacked(gaf.GAF(0.5))]
)
def test_no_micro_gradient_waits_for_the_host_off_the_cpu(policy: Any) -> None:
    """The meta device has no values: whatever wanted one would raise. The decision itself is the one transfer of a step."""
    p = [
        nn.Parameter(torch.empty(3, 4, device="meta")),
        nn.Parameter(torch.empty(5, device="meta")),
    ]
    acc = gaf.Accumulator(SGD(p, 0.1), policy, leave_out=lambda name, t: t.ndim == 1)
    for _ in range(4):
        acc.backward(p[0].sum() + p[1].sum())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta"):
        acc.decide()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
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


# ------------------------------------------------------------------------------------------------- the accelerator's path


@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("policy", ["gaf", "mean"])
def test_the_sum_for_accelerators_decides_and_updates_as_the_one_for_cpus(
    policy: str, average: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows through both, with a NaN row and a parameter that some rows leave out; tensors here are the CPU's."""
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
                patch.setattr(
                    "gaf.device.rows.SumOnCpu",
                    lambda voters, spare: SumOnDevice(
                        voters, average == "halving", torch.device("cpu")
                    ),
                )
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
