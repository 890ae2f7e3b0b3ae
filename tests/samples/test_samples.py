"""gaf.Samples is gaf.aggregate on stacked per-sample gradients, with the Accumulator's steps."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import gaf
from helpers.comparing import same
from helpers.samples import per_sample_rows

N = 6


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20, 3)
    ).double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(N, 2, 5, generator=rng).double() + 0.5
    return x, torch.tensor([0, 0, 1, 0, 2, 0])


def losses_of(model: nn.Module, step: int = 0) -> Tensor:
    x, y = batch(step)
    return cross_entropy(model(x), y, reduction="none")


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


POLICIES: list[Any] = [
    gaf.GAF(0.6),
    gaf.GAF(0.6, average="halving"),
    gaf.GAF(0.9, start="best"),
    gaf.GAF(0.0),
    gaf.Mean(),
    gaf.Guard(),
    lambda K: torch.softmax(K.mean(0), 0),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: getattr(p, "__name__", repr(p)))
def test_it_is_aggregate_on_per_sample_gradients(policy: Any) -> None:
    model = make_net()
    oracle = copy.deepcopy(policy)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    samples = gaf.Samples(model, optimizer, policy)
    for step in range(3):
        update, want = gaf.aggregate(per_sample_rows(model, *batch(step)), oracle)
        samples.backward(losses_of(model, step))
        decision = samples.decide()
        assert torch.equal(decision.accepted, want.accepted)
        torch.testing.assert_close(decision.weights, want.weights)
        torch.testing.assert_close(decision.distances, want.distances, equal_nan=True)
        if decision.stepped:
            torch.testing.assert_close(flat_grad(model), update)
        before = copy.deepcopy([*model.parameters()]), copy.deepcopy(optimizer.state_dict())
        assert samples.step() is decision
        after = [*model.parameters()], optimizer.state_dict()
        assert same(before, after) != decision.stepped.item()
        assert all(p.grad is None for p in model.parameters())
    stats = samples.stats()
    assert stats["steps"] == 3 and stats["micro_gradients"] == 3 * N


def test_the_policies_above_step_and_skip_accept_and_reject() -> None:
    rows = per_sample_rows(make_net(), *batch())
    taken = [gaf.aggregate(rows, policy)[1].accepted.sum().item() for policy in POLICIES[:4]]
    assert taken[3] == 0 and 2 <= taken[0] < N


def test_layers_decides_by_some_and_updates_all() -> None:
    model = make_net()
    last = per_sample_rows(model, *batch(), "3")
    rows = per_sample_rows(model, *batch())
    samples = gaf.Samples(model, SGD(model.parameters(), 0.1), gaf.GAF(0.5), layers=["3"])
    samples.backward(losses_of(model))
    decision = samples.decide()
    want = gaf.aggregate(last, gaf.GAF(0.5))[1]
    assert torch.equal(decision.accepted, want.accepted)
    assert not torch.equal(want.accepted, gaf.aggregate(rows, gaf.GAF(0.5))[1].accepted)
    torch.testing.assert_close(flat_grad(model), decision.weights @ rows)


def test_a_sample_that_is_not_finite_stops_the_step() -> None:
    model = make_net()
    samples = gaf.Samples(model, Adam(model.parameters()), gaf.GAF(2.0))
    before = copy.deepcopy([*model.parameters()])
    losses = losses_of(model)
    samples.backward(losses * torch.tensor([1, 1, torch.nan, 1, 1, 1]))
    decision = samples.step()
    assert not decision.stepped and not decision.accepted.any() and not decision.weights.any()
    assert decision.distances.isnan().tolist() == [False, False, True, False, False, False]
    assert same(before, [*model.parameters()])
    assert samples.stats()["absent"] == 1 and not samples.enough
    samples.backward(losses_of(model))
    assert samples.enough and samples.step().stepped


def test_state_gate_and_discard_are_the_accumulators() -> None:
    model = make_net()
    optimizer = SGD(model.parameters(), 0.1)
    samples = gaf.Samples(model, optimizer, gaf.GAF("auto"))
    scheduler = samples.gate(LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for step in range(3):
        samples.backward(losses_of(model, step))
        samples.step()
        scheduler.step()
    assert scheduler.last_epoch == samples.stats()["stepped"]
    state = samples.state_dict()
    samples.backward(losses_of(model))
    with pytest.raises(RuntimeError, match="followed by step"):
        samples.backward(losses_of(model))
    samples.discard()
    again = gaf.Samples(model, optimizer, gaf.GAF("auto"))
    again.load_state_dict(state)
    assert same(again.state_dict(), state)


def test_a_scaler_changes_nothing_but_an_overflow_stops_the_step() -> None:
    plain = make_net().float()
    scaled = copy.deepcopy(plain)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    ways = [
        (plain, gaf.Samples(plain, SGD(plain.parameters(), 0.1), gaf.GAF(0.7))),
        (scaled, gaf.Samples(scaled, SGD(scaled.parameters(), 0.1), gaf.GAF(0.7), scaler=scaler)),
    ]
    for model, samples in ways:
        for step in range(2):
            x, y = batch(step)
            samples.backward(cross_entropy(model(x.float()), y, reduction="none"))
            samples.step()
    assert same([*plain.parameters()], [*scaled.parameters()])  # a power of two
    stats = [samples.stats() for _, samples in ways]
    assert stats[0]["stepped"] == stats[1]["stepped"] == 2
    x, y = batch()
    x[0] = torch.inf
    ways[1][1].backward(cross_entropy(scaled(x.float()), y, reduction="none"))
    assert not ways[1][1].step().stepped
    assert scaler.get_scale() == 2.0**9


def test_its_hooks_go_with_it() -> None:
    model = make_net()
    samples = gaf.Samples(model, SGD(model.parameters(), 0.1), gaf.GAF(0.6))
    samples.backward(losses_of(model))
    samples.step()
    there = weakref.ref(samples)
    assert any(module._forward_hooks for module in model.modules())
    del samples
    gc.collect()
    assert there() is None
    assert not any(module._forward_hooks for module in model.modules())


def test_under_another_default_device() -> None:
    model = make_net()
    samples = gaf.Samples(model, SGD(model.parameters(), 0.1), gaf.GAF(0.6))
    losses = losses_of(model)
    with torch.device("meta"):
        samples.backward(losses)
        assert samples.step().accepted.any()


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_used_is_refused() -> None:
    model = make_net()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="scope 'layer'.*Use one such as gaf.GAF"):
        gaf.Samples(model, optimizer, gaf.GAF(0.9, scope="layer"))
    with pytest.raises(ValueError, match="a rule for each coordinate"):
        gaf.Samples(model, optimizer, gaf.Median())
    with pytest.raises(TypeError, match="Samples: model must be a torch.nn.Module"):
        gaf.Samples(optimizer, model, gaf.GAF(0.9))
    with pytest.raises(ValueError, match="'head' is none"):
        gaf.Samples(model, optimizer, gaf.GAF(0.9), layers=["head"])
    samples = gaf.Samples(model, optimizer, gaf.GAF(0.9))
    for policy in (gaf.Median(), gaf.GAF(0.9, scope="layer")):
        samples.policy = policy  # a new one, between steps
        with pytest.raises(ValueError, match="^Samples: the policy must decide about whole"):
            samples.backward(losses_of(model))
    samples.policy = gaf.GAF(0.9)
    with pytest.raises(ValueError, match="Samples: losses must be n real numbers"):
        samples.backward(losses_of(model).mean())
    losses_of(model).sum().backward()
    with pytest.raises(RuntimeError, match="must have no gradient before"):
        samples.backward(losses_of(model))


def waiting(**options: Any) -> tuple[nn.Module, SGD, gaf.Samples]:
    """A model, its optimizer, and Samples with a batch that waits for its step."""
    model = make_net().float()
    optimizer = SGD(model.parameters(), 0.1)
    samples = gaf.Samples(model, optimizer, gaf.GAF(0.9), **options)
    x, y = batch()
    samples.backward(cross_entropy(model(x.float()), y, reduction="none"))
    return model, optimizer, samples


def made(parameters: Any, model: Any = None, policy: Any = None, **options: Any) -> gaf.Samples:
    net = make_net() if model is None else model
    return gaf.Samples(net, SGD(parameters, 0.1), policy or gaf.GAF(0.9), **options)


def step_after_zeroing() -> None:
    _, optimizer, samples = waiting()
    samples.decide()
    optimizer.zero_grad()
    samples.step()


def step_elsewhere() -> None:
    _, optimizer, samples = waiting()
    optimizer.step()
    assert samples


def stray_gradient() -> None:
    model = make_net()
    samples = made(model.parameters(), model)
    losses_of(model).sum().backward()
    samples.backward(losses_of(model))


def discard_after_decide() -> None:
    samples = waiting()[2]
    samples.decide()
    samples.discard()


def two_under_a_scaler() -> None:
    scaler = GradScaler("cpu")
    first = waiting(scaler=scaler)  # held while the second begins
    waiting(scaler=scaler)
    assert first


def state_with_until() -> None:
    acc = gaf.Accumulator(
        SGD(make_net().parameters(), 0.1), gaf.Mean(), until=gaf.Agreement(rho=0.7, at_most=8)
    )
    model = make_net()
    made(model.parameters(), model, gaf.Mean()).load_state_dict(acc.state_dict())


def losses_of_another_model() -> None:
    model = make_net()
    made(model.parameters(), model).backward(losses_of(make_net()))


INHERITED: dict[str, tuple[Any, Any]] = {
    "no optimizer": (
        lambda: gaf.Samples(make_net(), None, gaf.GAF(0.9)),  # type: ignore[arg-type]
        "optimizer must be a torch.optim.Optimizer",
    ),
    "no policy": (lambda: made(make_net().parameters(), policy=3), "policy must be a callable"),
    "no scaler": (
        lambda: made(make_net().parameters(), scaler=3),
        "scaler must be a torch.amp.GradScaler",
    ),
    "another model's": (
        lambda: made(make_net().parameters()),
        "model must hold the optimizer's parameters",
    ),
    "complex": (
        lambda: made((m := nn.Linear(2, 2, dtype=torch.cfloat)).parameters(), m),
        "parameters must be real",
    ),
    "two devices": (
        lambda: made(
            (m := nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))).parameters(), m
        ),
        "on one device; they are on cpu, meta.",
    ),
    "nothing waits": (
        lambda: made((m := make_net()).parameters(), m).step(),
        r"needs at least one backward\(\).*Call samples.backward\(\)",
    ),
    "a step elsewhere": (
        step_elsewhere,
        r"must not be called.*Call samples.step\(\)",
    ),
    "an update that is gone": (
        step_after_zeroing,
        "the update .* must still be there; it was gone",
    ),
    "a stray gradient": (stray_gradient, r"must have no gradient.*to samples.backward\(\)"),
    "discard": (discard_after_decide, r"discard\(\) came after decide\(\)"),
    "state": (lambda: waiting()[2].state_dict(), r"state_dict\(\) must come between"),
    "load": (lambda: waiting()[2].load_state_dict({}), r"load_state_dict\(\) must come between"),
    "no state": (
        lambda: made((m := make_net()).parameters(), m).load_state_dict({}),
        r"takes what state_dict\(\) gave.*Save samples.state_dict\(\)",
    ),
    "a state with until": (state_with_until, "the state must be of an object with the same until"),
    "a scaler twice": (two_under_a_scaler, "scaler must serve one macro-batch at a time"),
    "losses of another model": (losses_of_another_model, "the losses must depend on trainable"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fault", INHERITED)
def test_what_the_accumulator_refuses_names_samples(fault: str) -> None:
    provoke, text = INHERITED[fault]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^Samples: .*{text}") as found:
        provoke()
    assert "Accumulator" not in str(found.value)
