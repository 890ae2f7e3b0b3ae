"""gaf.Guard: the average, unless something is broken."""

import math

import pytest
import torch
from torch import Tensor

import gaf

K = pytest.mark.parametrize("k", [2, 3, 4, 5, 8])


def rows(k: int, n: int = 200) -> Tensor:
    """Gaussian rows around a common direction."""
    return torch.randn(k, n, dtype=torch.float64) + 0.3


def used(policy: gaf.Guard, k: int, steps: int = 50) -> gaf.Guard:
    for _ in range(steps):
        decision = gaf.aggregate(rows(k), policy)[1]
        assert decision.accepted.all()
        assert policy.findings == []
    return policy


@K
def test_nothing_broken_is_the_average_with_exact_weights(k: int) -> None:
    g = rows(k)
    update, decision = gaf.aggregate(g, gaf.Guard())
    assert decision.weights.tolist() == [1 / k] * k
    assert torch.equal(update, gaf.aggregate(g, gaf.Mean())[0])
    for i in range(k):
        rest = g.sum(0) - g[i]
        want = 1 - g[i] @ rest / g[i].norm() / rest.norm()
        assert decision.distances[i].item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("k", [3, 4, 5, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_left_out(k: int, bad: float) -> None:
    g = rows(k)
    g[1, 7] = bad
    policy = gaf.Guard()
    update, decision = gaf.aggregate(g, policy)
    assert decision.accepted.tolist() == [i != 1 for i in range(k)]
    assert [f.row for f in policy.findings] == [1]
    assert policy.findings[0].kind == "not finite"
    torch.testing.assert_close(
        update, (g.nan_to_num(0, 0, 0).sum(0) - g[1].nan_to_num(0, 0, 0)) / (k - 1)
    )


@pytest.mark.parametrize(("k", "bad"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 4)])
def test_half_of_the_rows_or_more_broken_is_a_skip(k: int, bad: int) -> None:
    g = rows(k)
    g[:bad, 0] = math.nan
    policy = gaf.Guard()
    update, decision = gaf.aggregate(g, policy)
    assert not decision.stepped
    assert not decision.accepted.any()
    assert not update.any()
    assert [f.row for f in policy.findings] == list(range(bad))
