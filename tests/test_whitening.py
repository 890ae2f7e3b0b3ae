"""`GAF(metric="whitened")`: Mahalanobis products in the rows' span, wherever a policy has K."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import gaf
from gaf.rules.whitening import whiten
from helpers.accumulating import feed, vector
from helpers.comparing import same


def rows_of(k: int, n: int, seed: int = 0, noise: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.ones(n, dtype=torch.float64) + noise * torch.randn(
        k, n, generator=random, dtype=torch.float64
    )


def direct(G: Tensor, ridge: float) -> Tensor:
    """G (l I + S)^-1 G' by the (n, n) matrix itself."""
    k, n = G.shape
    centred = G - G.mean(0)
    S = centred.T @ centred / (k - 1)
    l = ridge * float((centred @ centred.T).diagonal().mean()) / (k - 1)  # noqa: E741
    return G @ torch.linalg.inv(l * torch.eye(n, dtype=G.dtype) + S) @ G.T


@pytest.mark.parametrize(("k", "n"), [(2, 5), (4, 50), (8, 3), (16, 40)])
@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("unit", [1.0, 1e-100, 1e100])
def test_from_k_alone_it_is_the_direct_formula(k: int, n: int, ridge: float, unit: float) -> None:
    G = rows_of(k, n)
    found = whiten(gaf.gram(unit * G), ridge)
    expected = direct(G, ridge)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    assert torch.equal(found, found.T)


def test_absent_rows_take_no_part() -> None:
    G = rows_of(6, 30)
    broken = G.clone()
    broken[1], broken[4] = math.nan, 0.0
    kept = [0, 2, 3, 5]
    found = whiten(gaf.gram(broken), 0.5)
    assert torch.allclose(found[kept][:, kept], direct(G[kept], 0.5), rtol=1e-10)
    assert not found[[1, 4]].any() and not found[:, [1, 4]].any()
    decision = gaf.GAF(2.0, metric="whitened")(gaf.gram(broken))
    assert decision.accepted.tolist() == [i in kept for i in range(6)]
    assert decision.distances.isnan().tolist() == [i not in kept for i in range(6)]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_rows_without_scatter_agree_wholly(k: int) -> None:
    G = rows_of(1, 7).repeat(k, 1)
    for given in (G, G.float() * (1 + 1e-16)):
        found = whiten(gaf.gram(given), 1.0)
        assert torch.allclose(found, torch.ones(k, k, dtype=torch.float64), rtol=1e-12)
    update, decision = gaf.aggregate(G, gaf.GAF(0.1, metric="whitened"))
    assert decision.stepped and decision.accepted.all()
    assert torch.allclose(update, G[0], rtol=1e-14)


def test_without_present_rows_nothing_is_accepted() -> None:
    for empty in (torch.zeros(3, 4), torch.full((3, 4), math.nan)):
        assert not gaf.aggregate(empty, gaf.GAF(2.0, metric="whitened"))[1].stepped


def test_a_large_ridge_is_the_plain_metric() -> None:
    K = gaf.gram(rows_of(5, 30))
    plain, near = gaf.GAF(0.9)(K), gaf.GAF(0.9, metric="whitened", ridge=1e9)(K)
    assert torch.allclose(plain.distances, near.distances, atol=1e-7)


@pytest.mark.parametrize("start", ["first", "best", "worst"])
@pytest.mark.parametrize("average", ["mean", "halving"])
def test_decisions_are_those_of_the_plain_rule_on_rows_in_the_metric(
    start: Any, average: Any
) -> None:
    """Rows times the root of the metric have its inner products; the update is of the rows."""
    for seed in range(20):
        G = rows_of(6, 12, seed, noise=3.0)
        centred = G - G.mean(0)
        l = float((centred**2).sum() / 6) / 5  # noqa: E741
        inverse = torch.linalg.inv(l * torch.eye(12, dtype=G.dtype) + centred.T @ centred / 5)
        values, vectors = torch.linalg.eigh(inverse)
        moved = G @ vectors * values.sqrt()
        for tau in (0.3, 0.6, 0.9):
            rule: dict[str, Any] = {"start": start, "average": average}
            expected = gaf.GAF(tau, **rule)(gaf.gram(moved))
            update, found = gaf.aggregate(G, gaf.GAF(tau, metric="whitened", **rule))
            assert found.accepted.tolist() == expected.accepted.tolist()
            assert torch.allclose(found.distances, expected.distances, atol=1e-9)
            assert torch.allclose(update, expected.weights @ G, atol=1e-12)


@pytest.mark.parametrize("scope", ["all", "layer"])
def test_the_accumulator_decides_as_aggregate(scope: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False).double()
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1), gaf.GAF(0.8, metric="whitened", scope=scope), model=model
    )
    rows = rows_of(5, 12, noise=3.0)
    for row in rows:
        acc.backward((model.weight * row.view(3, 4)).sum())
    update, expected = gaf.aggregate(rows, gaf.GAF(0.8, metric="whitened"))
    decision = acc.decide()
    assert decision.accepted.tolist() == expected.accepted.tolist()
    assert torch.allclose(decision.distances, expected.distances, atol=1e-12)
    if decision.stepped:
        assert torch.allclose(model.weight.grad.flatten(), update, rtol=1e-12)
    norms2 = torch.tensor(acc.outcome.norms2, dtype=torch.float64)
    assert torch.allclose(norms2, rows.square().sum(1))  # the rows' own, in statistics
    acc.step()


THRESHOLDS = [
    lambda: "auto",
    lambda: gaf.MovingAverageTau(0.05),
    lambda: gaf.QuantileTau(0.7),
    lambda: gaf.SignalTau(1.0),
    lambda: gaf.NoiseFloorTau(1.0),
]


@pytest.mark.parametrize("make", THRESHOLDS)
def test_adaptive_thresholds_follow_its_distances_and_resume(make: Any) -> None:
    """As if the rows in the metric had been given to the same threshold under the plain one."""
    policy, plain = gaf.GAF(make(), metric="whitened"), gaf.GAF(make())
    for seed in range(30):
        K = gaf.gram(rows_of(6, 20, seed, noise=2.0))
        if seed == 15:
            resumed = gaf.GAF(make(), metric="whitened")
            resumed.load_state_dict(policy.state_dict())
            policy = resumed
        found, expected = policy(K), plain(whiten(K, 1.0))
        assert same(found.distances.tolist(), expected.distances.tolist())
        assert found.accepted.tolist() == expected.accepted.tolist()
    assert policy.tau_on(K.device) == plain.tau_on(K.device)


def test_a_skip_leaves_the_weights() -> None:
    p = vector(3, torch.float64)
    acc = gaf.Accumulator(SGD([p], 0.1, momentum=0.9), gaf.GAF(0.0, metric="whitened"))
    feed(acc, p, rows_of(4, 3))
    assert not acc.step().stepped
    assert torch.equal(p, torch.ones(3, dtype=torch.float64))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metric": "fisher"},
            "metric must be one of 'euclidean', 'optimizer', 'whitened'; got 'f",
        ),
        ({"ridge": 0.0}, "ridge must be a number above 0; got 0.0. 1 is the default."),
        ({"ridge": math.inf}, "ridge must be a number above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaf.GAF(0.9, **arguments)
