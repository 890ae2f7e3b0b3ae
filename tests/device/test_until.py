"""`until=gaf.Agreement(...)`: a macro-batch grows until its micro-gradients agree."""

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import gaf
from gaf.integrations.options import check_names
from gaf.integrations.trackers import metrics
from helpers.accumulating import SCALED, feed, scaler_for, state_of, vector
from helpers.comparing import same


def noisy_rows(count: int, n: int = 20, noise: float = 2.0, seed: int = 0) -> Tensor:
    """A common direction, and noise of `noise` times its length."""
    random = torch.Generator().manual_seed(seed)
    signal = torch.ones(n, dtype=torch.float64) / math.sqrt(n)
    scatter = torch.randn(count, n, generator=random, dtype=torch.float64) / math.sqrt(n)
    return signal + noise * scatter


def steps_of(
    acc: gaf.Accumulator, p: nn.Parameter, rows: Tensor
) -> Iterator[tuple[list[Tensor], gaf.Decision]]:
    """The rows of each step, and its decision."""
    taken: list[Tensor] = []
    for row in rows:
        feed(acc, p, [row])
        taken.append(row)
        if acc.enough:
            yield taken, acc.step()
            taken = []


def share(c: int, r: float) -> float:
    return max(c * r / (1 + (c - 1) * r), 0.0)


@pytest.mark.parametrize("rho", [0.4, 0.8])
def test_c_is_the_smallest_whose_share_reaches_rho_by_k_of_the_steps_before(rho: float) -> None:
    p, window, at_most = vector(20, torch.float64), 5.0, 40
    until = gaf.Agreement(rho, at_most, window=window)
    acc = gaf.Accumulator(SGD([p], 1e-3), gaf.Mean(), until=until)
    between = own = 0.0
    sizes = []
    for rows, decision in steps_of(acc, p, noisy_rows(400)):
        c, K = len(rows), gaf.gram(torch.stack(rows))
        mean_off = float((K.sum() - K.trace()) / (c * (c - 1)))
        r = between / own if own else mean_off / float(K.trace() / c)
        if own:  # known before the step: exactly the smallest
            wanted = next((m for m in range(2, at_most) if share(m, r) >= rho), at_most)
            assert c == wanted
        else:  # by the rows themselves
            assert c == at_most or share(c, r) >= rho
        assert decision.accepted.all() and decision.weights.tolist() == [1 / c] * c
        between = (1 - 1 / window) * between + mean_off
        own = (1 - 1 / window) * own + float(K.trace() / c)
        sizes.append(c)
        stats = acc.stats()
        assert stats["agreement"] == pytest.approx(between / own, rel=1e-10)
        assert stats["signal_share"] == pytest.approx(share(c, between / own), rel=1e-10)
        assert stats["rows_mean"] == pytest.approx(sum(sizes[-100:]) / len(sizes[-100:]))
    assert len(set(sizes)) > 2 and max(sizes) <= at_most


def test_the_share_is_the_squared_cosine_of_the_mean_to_the_true_gradient() -> None:
    """In many coordinates both concentrate: a mean over repetitions checks the formula."""
    n, c, noise = 400, 6, 3.0
    r = 1 / (1 + noise**2)
    signal = torch.ones(n, dtype=torch.float64) / math.sqrt(n)
    squares = []
    for seed in range(300):
        mean = noisy_rows(c, n, noise, seed).mean(0)
        squares.append(float((mean @ signal) ** 2 / (mean @ mean)))
    estimate = gaf.Agreement(0.5, 64).share(c, r)
    # one cosine scatters by about 1 / sqrt(n) = 0.05: the mean of 300 by 0.003
    assert sum(squares) / 300 == pytest.approx(estimate, abs=0.012)


def test_noise_alone_goes_on_to_at_most_and_equal_rows_stop_at_two() -> None:
    p = vector(2, torch.float64)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Mean(), until=gaf.Agreement(0.5, 7))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(7, 1)
    assert [len(rows) for rows, _ in steps_of(acc, p, opposite)] == [7, 7]
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Mean(), until=gaf.Agreement(0.99, 7))
    assert [len(rows) for rows, _ in steps_of(acc, p, torch.ones(8, 2))] == [2, 2, 2, 2]


@SCALED
def test_absent_rows_count_in_c_and_teach_nothing(scaled: bool) -> None:
    p = vector(2, torch.float64)
    until = gaf.Agreement(0.5, 3)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Mean(), until=until, scaler=scaler_for(scaled))
    feed(acc, p, [[1.0, 0.0], [0.0, 0.0]])
    assert not acc.enough  # one row is present: nothing is known
    feed(acc, p, [[0.0, 0.0]])
    assert acc.enough
    acc.step()
    assert math.isnan(acc.stats()["agreement"]) and acc.stats()["rows_mean"] == 3
    feed(acc, p, [[1.0, 0.0], [1.0, 1.0]])
    assert acc.enough
    acc.step()
    assert acc.stats()["agreement"] == pytest.approx(1 / 1.5)


def test_a_loss_scale_does_not_change_r() -> None:
    found = []
    for scaled in (False, True):
        p = vector(20, torch.float64)
        until, scaler = gaf.Agreement(0.6, 30), scaler_for(scaled)
        acc = gaf.Accumulator(SGD([p], 1e-3), gaf.Mean(), until=until, scaler=scaler)
        sizes = [len(rows) for rows, _ in steps_of(acc, p, noisy_rows(200))]
        found.append((sizes, acc.stats()["agreement"]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


@pytest.mark.parametrize(("rate", "power"), [("constant", 0), ("linear", 1), ("sqrt", 0.5)])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_rate_is_scaled_for_the_step_alone(rate: str, power: float, tensor: bool) -> None:
    p, q = vector(2, torch.float64), vector(2, torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    groups = [{"params": [p], "lr": lr}, {"params": [q], "lr": 0.2}]
    optimizer = SGD(groups, lr=0.5)
    until = gaf.Agreement(0.99, 4, rate=rate)  # type: ignore[arg-type]
    acc = gaf.Accumulator(optimizer, gaf.Mean(), until=until)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    for row in rows:
        acc.backward((p * row).sum() + (q * row).sum())
    assert acc.enough
    acc.step()
    for moved, own in ((p, 0.1), (q, 0.2)):
        expected = 1 - own * 4**power * rows.mean(0)
        assert torch.allclose(moved.detach(), expected, rtol=1e-15, atol=1e-15)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1, 0.2]


def test_the_rate_is_put_back_after_a_step_that_raises() -> None:
    p = vector(2)
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.Mean(), until=gaf.Agreement(0.5, 2, rate="linear"))
    feed(acc, p, [[1.0, 0.0], [1.0, 0.0]])

    def fail(*_: object) -> None:
        assert optimizer.param_groups[0]["lr"] == 0.2
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        acc.step()
    hook.remove()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_skip_leaves_everything_bitwise_and_counts_its_rows() -> None:
    p = vector(2)
    optimizer = Adam([p], 0.1)
    policy = gaf.RandomSkip(0.0)
    acc = gaf.Accumulator(optimizer, policy, until=gaf.Agreement(0.5, 2, rate="sqrt"))
    before = p.detach().clone(), state_of(optimizer)
    feed(acc, p, [[1.0, 0.0], [1.0, 0.0]])
    assert acc.enough and not acc.step().stepped
    assert torch.equal(p, before[0]) and same(state_of(optimizer), before[1])
    assert acc.stats()["rows_mean"] == 2 and acc.stats()["agreement"] == 1


def test_a_resumed_run_takes_the_same_steps() -> None:
    rows = noisy_rows(300)
    p = vector(20, torch.float64)
    make = lambda q: gaf.Accumulator(  # noqa: E731
        SGD([q], 1e-2), gaf.Mean(), until=gaf.Agreement(0.7, 30)
    )
    acc = make(p)
    whole = list(steps_of(acc, p, rows))
    sizes = [len(taken) for taken, _ in whole]
    q = vector(20, torch.float64)
    first = make(q)
    done = sum(sizes[:9])
    assert [len(t) for t, _ in steps_of(first, q, rows[:done])] == sizes[:9]
    state = json.loads(json.dumps(first.state_dict()))
    second = make(q)
    second.load_state_dict(state)
    assert [len(t) for t, _ in steps_of(second, q, rows[done:])] == sizes[9:]
    assert torch.equal(p, q) and same(acc.stats(), second.stats())


def test_enough_follows_the_macro_batch() -> None:
    p = vector(2)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Mean(), until=gaf.Agreement(0.5, 2))
    assert not acc.enough
    feed(acc, p, [[1.0, 0.0]])
    assert not acc.enough
    acc.decide()  # before it is enough: an epoch ends
    assert acc.enough
    acc.step()
    assert not acc.enough


def test_each_accumulator_learns_by_itself() -> None:
    until, p = gaf.Agreement(0.5, 4), vector(2)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Mean(), until=until)
    feed(acc, p, [[1.0, 0.0], [1.0, 0.0]])
    acc.step()
    assert acc.stats()["agreement"] == 1 and math.isnan(until.r)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, "rho must be above 0 and below 1; got 0.0"),
        ({"rho": 1.0}, "rho must be above 0 and below 1; got 1.0"),
        ({"rho": math.nan}, "rho must be above 0"),
        ({"rho": True}, "rho must be above 0"),
        ({"at_most": 1}, "at_most must be a whole number of at least 2; got 1"),
        ({"at_most": 2.5}, "at_most must be a whole number"),
        ({"rate": "log"}, "rate must be one of 'constant', 'linear', 'sqrt'; got 'log'"),
        ({"window": 0.5}, "window must be a number of at least 1; got 0.5"),
    ],
)
def test_an_agreement_out_of_range_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaf.Agreement(**{"rho": 0.5, "at_most": 8, **arguments})


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_go_with_until_is_refused() -> None:
    p = vector(2)
    optimizer, until = SGD([p], 0.1), gaf.Agreement(0.5, 4)
    with pytest.raises(TypeError, match=r"until must be a gaf.Agreement or None; got 0.5"):
        gaf.Accumulator(optimizer, gaf.Mean(), until=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"averages all micro-gradients; got GAF\(tau=0.8"):
        gaf.Accumulator(optimizer, gaf.GAF(0.8), until=until)
    acc = gaf.Accumulator(optimizer, gaf.Mean(), until=until)
    with pytest.raises(ValueError, match="averages all micro-gradients"):
        acc.policy = gaf.GAF(0.8)
    with pytest.raises(RuntimeError, match="enough needs a rule .* until is None"):
        assert gaf.Accumulator(optimizer, gaf.Mean()).enough

    class Named(gaf.Accumulator):
        subject = "Named"

    with pytest.raises(TypeError, match="^Named: until must be a gaf.Agreement or None"):
        Named(optimizer, gaf.Mean(), until=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^Named: until goes with a policy that averages"):
        Named(optimizer, gaf.GAF(0.8), until=until)
    with pytest.raises(RuntimeError, match="^Named: enough needs a rule"):
        assert Named(optimizer, gaf.Mean()).enough


def test_a_state_of_another_kind_is_refused_and_nothing_is_taken() -> None:
    p = vector(2)
    optimizer, until = SGD([p], 0.1), gaf.Agreement(0.5, 4)
    acc = gaf.Accumulator(optimizer, gaf.Mean(), until=until)
    feed(acc, p, [[1.0, 0.0], [1.0, 0.0]])
    acc.step()
    state = acc.state_dict()
    plain = gaf.Accumulator(optimizer, gaf.Mean())
    assert "until" not in plain.state_dict()
    with pytest.raises(ValueError, match="it is of one with until, and this has none"):
        plain.load_state_dict(state)
    other = gaf.Accumulator(optimizer, gaf.Mean(), until=until)
    with pytest.raises(ValueError, match="it is of one without until, and this has one"):
        other.load_state_dict(plain.state_dict())
    broken = copy.deepcopy(state)
    del broken["until"]["means"]
    with pytest.raises(ValueError, match="the state must hold means and sizes"):
        other.load_state_dict(broken)
    assert other.stats()["steps"] == 0


@pytest.mark.parametrize("adapter", ["GAFCallback", "GAFTrainer", "accelerate.attach"])
def test_the_adapters_refuse_until_because_frameworks_fix_the_macro_batch(adapter: str) -> None:
    with pytest.raises(TypeError, match=f"{adapter}: until must be left out, because the framew"):
        check_names({"until": gaf.Agreement(0.5, 4)}, adapter)


def test_trackers_get_the_numbers_of_until() -> None:
    p = vector(2)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Mean(), until=gaf.Agreement(0.5, 4))
    feed(acc, p, [[1.0, 0.0], [1.0, 0.0]])
    acc.step()
    found = metrics(acc)
    names = ("rows_mean", "agreement", "signal_share")
    assert [found[f"gaf/{name}"] for name in names] == [2, 1, 1]
