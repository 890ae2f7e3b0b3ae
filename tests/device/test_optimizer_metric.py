"""`GAF(metric="optimizer")` under the Accumulator: K = G M G' by the optimizer's second moments."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

import gaf
from gaf.device.rows import rows_without_waiting
from gaf.rules.second_moments import check_no_optimizer_metric
from helpers.accumulating import SCALED, scaler_for, state_of
from helpers.comparing import same

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "Adam": (Adam, {"betas": (0.8, 0.9), "eps": 1e-6}),
    "AdamW, amsgrad": (AdamW, {"amsgrad": True, "betas": (0.9, 0.7)}),
    "RMSprop": (RMSprop, {"alpha": 0.8}),
    "RMSprop, centered": (RMSprop, {"alpha": 0.8, "centered": True, "momentum": 0.5}),
    "Adagrad": (Adagrad, {"initial_accumulator_value": 0.1}),
    "Adagrad, fused": (Adagrad, {"fused": True}),
    "Adam, fused": (Adam, {"fused": True}),
}
KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)


class Denominators:
    """M of the next step, from a history of updates by the optimizers' published formulas."""

    def __init__(self, kind: str) -> None:
        self.name, self.options = kind.split(",")[0], OPTIMIZERS[kind][1]
        self.t, self.v, self.mean, self.most = 0, 0.0, 0.0, 0.0

    def add(self, g: Tensor) -> None:
        self.t += 1
        if self.name == "Adagrad":
            self.v = g**2 + (
                self.v if self.t > 1 else self.options.get("initial_accumulator_value", 0)
            )
        else:
            beta = self.options.get("alpha") or self.options.get("betas", (0.9, 0.999))[1]
            self.v = beta * self.v + (1 - beta) * g**2
            self.mean = beta * self.mean + (1 - beta) * g
            self.most = torch.maximum(torch.as_tensor(self.most), self.v)

    def metric(self) -> Tensor | float:
        if not self.t:
            return 1.0
        v: Any = self.most if self.options.get("amsgrad") else self.v
        if self.name.startswith("Adam"):
            v = v / (1 - self.options.get("betas", (0.9, 0.999))[1] ** self.t)
        if self.options.get("centered"):
            v = v - self.mean**2
        return 1 / (v.sqrt() + self.options.get("eps", 1e-10 if self.name == "Adagrad" else 1e-8))


def rows_of(k: int, n: int, seed: int) -> Tensor:
    """Rows whose coordinates have very different sizes."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, n, dtype=torch.float64)
    return scale * (0.7 + torch.randn(k, n, generator=random, dtype=torch.float64))


def make(
    kind: str, policy: Any, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Parameter, nn.Parameter, gaf.Accumulator]:
    """Two parameters, one of them channels_last, of 24 + 6 coordinates."""
    p = torch.ones(2, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
    params = nn.Parameter(p), nn.Parameter(torch.ones(6, dtype=dtype))
    build, how = OPTIMIZERS[kind]
    return *params, gaf.Accumulator(build(params, lr=0.01, **how), policy, **options)


def feed(acc: gaf.Accumulator, p: nn.Parameter, q: nn.Parameter, rows: Tensor) -> None:
    for row in rows.to(p.dtype):
        acc.backward((p * row[:24].view(p.shape)).sum() + (q * row[24:]).sum())


def snapshot(optimizer: Optimizer) -> dict[Any, dict[str, Tensor]]:
    return {
        p: {name: value.clone() for name, value in state.items()}
        for p, state in optimizer.state.items()
    }


def expected_gram(rows: Tensor, M: Any) -> Tensor:
    return (rows * M) @ rows.T


@KINDS
@pytest.mark.parametrize("start", ["first", "best"])
@pytest.mark.parametrize("waiting", [True, False])
def test_decisions_are_those_of_g_m_g(
    kind: str, start: Any, waiting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against M from the history of updates, rows streamed or kept, as on a CPU or a device."""
    if not waiting:
        monkeypatch.setattr("gaf.device.accumulate.rows_for", rows_without_waiting)
    p, q, acc = make(kind, gaf.GAF(0.8, start=start, metric="optimizer"))
    known, plain, accepted = Denominators(kind), gaf.GAF(0.8, start=start), []
    for step in range(12):
        rows = rows_of(5, 30, step)
        M = known.metric()
        expected = plain(expected_gram(rows, M))
        feed(acc, p, q, rows)
        found = acc.decide()
        assert found.accepted.tolist() == expected.accepted.tolist()
        assert torch.allclose(found.distances, expected.distances, atol=1e-12)
        assert torch.allclose(found.weights, expected.weights, atol=0, rtol=1e-15)
        norms2 = torch.tensor(acc.outcome.norms2, dtype=torch.float64)
        assert torch.allclose(norms2, expected_gram(rows, M).diagonal(), rtol=1e-10)
        if found.stepped:  # the update is of the rows themselves
            update = torch.cat([p.grad.contiguous().flatten(), q.grad.flatten()])
            assert torch.allclose(update, expected.weights @ rows, rtol=1e-12)
            known.add(update)
        accepted.append(found.accepted.tolist())
        acc.step()
    assert len({tuple(a) for a in accepted}) > 1 and known.t > 3
    different = [plain(gaf.gram(rows_of(5, 30, step))).accepted.tolist() for step in range(12)]
    assert accepted != different


@SCALED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_and_under_a_scaler(scaled: bool, dtype: torch.dtype) -> None:
    policy = gaf.GAF(2.0, metric="optimizer")
    p, q, acc = make("Adam", policy, dtype, scaler=scaler_for(scaled))
    for step in range(4):
        rows = rows_of(4, 30, step)
        state = snapshot(acc.optimizers[0])
        feed(acc, p, q, rows)
        decision = acc.step()
        if step == 0:
            continue
        v = [state[x]["exp_avg_sq"].double() / (1 - 0.9**step) for x in (p, q)]
        M = torch.cat([1 / (x.contiguous().flatten().sqrt() + 1e-6) for x in v])
        expected = gaf.GAF(2.0)(expected_gram(rows.to(dtype).double(), M))
        close = 1e-5 if dtype == torch.float32 else 0.02  # the sums themselves are in float32
        assert torch.allclose(decision.distances, expected.distances, atol=close)


def test_before_the_first_step_and_for_parameters_without_v_it_says_what_it_does() -> None:
    p, q, acc = make("Adam", gaf.GAF(2.0, metric="optimizer"))
    rows = rows_of(3, 30, 0)
    for row in rows:  # q gets no gradient
        acc.backward((p * row[:24].view(p.shape)).sum())
    plain = gaf.GAF(2.0)(gaf.gram(rows[:, :24]))
    assert torch.allclose(acc.step().distances, plain.distances)
    feed(acc, p, q, rows)
    v = acc.optimizers[0].state[p]["exp_avg_sq"].contiguous().flatten() / (1 - 0.9)
    M = 1 / (v.sqrt() + 1e-6)
    expected = gaf.GAF(2.0)(expected_gram(rows[:, :24], M))
    assert torch.allclose(acc.step().distances, expected.distances)
    feed(acc, p, q, rows.clone().index_fill_(1, torch.tensor([29]), math.nan)[:1])
    feed(acc, p, q, rows[:2])
    assert acc.step().accepted.tolist() == [False, True, True]  # NaN in q counts
    broken = rows.clone()
    broken[0, 29] = math.inf
    feed(acc, p, q, broken)
    assert acc.step().accepted.tolist() == [False, True, True]


def test_layers_have_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    optimizer = Adam(model.parameters(), 0.01)
    policy = gaf.GAF(0.9, metric="optimizer", scope="layer")
    acc = gaf.Accumulator(optimizer, policy, model=model)
    for _ in range(4):
        state = snapshot(optimizer)
        rows: dict[str, list[Tensor]] = {"0": [], "1": []}
        for _ in range(4):
            x = torch.randn(2, 4).double()
            loss = model(x).square().mean()
            for name in rows:
                grads = torch.autograd.grad(
                    loss, list(model[int(name)].parameters()), retain_graph=True
                )
                rows[name].append(torch.cat([g.flatten() for g in grads]))
            acc.backward(loss)
        acc.step()
        for name, found in acc.layers.items():
            G, params = torch.stack(rows[name]), list(model[int(name)].parameters())
            M: Any = 1.0
            if state.get(params[0]):
                t = float(state[params[0]]["step"])
                v = torch.cat([state[x]["exp_avg_sq"].flatten() for x in params]) / (1 - 0.999**t)
                M = 1 / (v.sqrt() + 1e-8)
            expected = gaf.GAF(0.9)(expected_gram(G, M))
            assert torch.allclose(found.distances, expected.distances, atol=1e-10)
            assert found.accepted.tolist() == expected.accepted.tolist()


def test_a_skip_is_bitwise_and_a_resumed_run_decides_alike() -> None:
    p, q, acc = make("Adam", gaf.GAF("auto", metric="optimizer"))
    x, y, other = make("Adam", gaf.GAF("auto", metric="optimizer"))
    skipped = 0
    for step in range(40):
        rows = rows_of(4, 30, step)
        if step % 5 == 4:
            rows[1:] *= -1
        before = p.detach().clone(), state_of(acc.optimizers[0])
        feed(acc, p, q, rows)
        decision = acc.step()
        if not decision.stepped:
            skipped += 1
            assert torch.equal(p, before[0]) and same(state_of(acc.optimizers[0]), before[1])
        if step == 20:
            with torch.no_grad():
                x.copy_(p), y.copy_(q)
            other.optimizers[0].load_state_dict(copy.deepcopy(acc.optimizers[0].state_dict()))
            other.load_state_dict(acc.state_dict())
        if step > 20:
            feed(other, x, y, rows)
            assert same(other.step().distances.tolist(), decision.distances.tolist())
    assert skipped and torch.equal(p, x) and torch.equal(q, y)


@pytest.mark.parametrize(
    "tau",
    [gaf.MovingAverageTau, gaf.QuantileTau, gaf.SignalTau, gaf.NoiseFloorTau],
)
def test_adaptive_thresholds_follow_its_distances(tau: Any) -> None:
    p, q, acc = make("Adam", gaf.GAF(tau(), metric="optimizer"))
    known, plain = Denominators("Adam"), gaf.GAF(tau())
    for step in range(25):
        rows = rows_of(6, 30, step)
        expected = plain(expected_gram(rows, known.metric()))
        feed(acc, p, q, rows)
        found = acc.step()
        assert found.accepted.tolist() == expected.accepted.tolist()
        if found.stepped:
            known.add(expected.weights @ rows)
    assert acc.stats()["tau"] == pytest.approx(acc.outcome.tau)


def test_what_has_no_second_moments_is_refused() -> None:
    p, policy = nn.Parameter(torch.ones(2)), gaf.GAF(0.9, metric="optimizer")
    for optimizer in (SGD([p], 0.1), NAdam([p])):
        name = type(optimizer).__name__
        with pytest.raises(TypeError, match=f"needs the second moments of Adam.* is {name}"):
            gaf.Accumulator(optimizer, policy)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.9))
    with pytest.raises(TypeError, match="Accumulator: metric='optimizer' needs"):
        acc.policy = policy
    with pytest.raises(ValueError, match="aggregate: metric='optimizer' works under"):
        gaf.aggregate(torch.ones(2, 2), policy)
    with pytest.raises(ValueError, match="Samples: metric='optimizer' works under"):
        gaf.Samples(nn.Linear(2, 1), Adam([p]), policy)
    with pytest.raises(ValueError, match="here: .* alone; why"):
        check_no_optimizer_metric(policy, "here", "why")
