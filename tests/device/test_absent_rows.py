"""Absent rows (zero, NaN, infinite, far longer than others), and parameters without a gradient."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gaf
from helpers.accumulating import feed, vector
from helpers.pairs import each_pair


@pytest.mark.parametrize(
    ("bad", "average", "place"),
    each_pair([0.0, math.nan, math.inf], ["mean", "halving"], [0, 1, 3]),
)
def test_an_absent_micro_gradient_leaves_no_trace(bad: float, average: str, place: int) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5, average=average))
    rows = [[8.0, 0.0], [16.0, 0.0], [32.0, 0.0]]
    rows.insert(place, [bad, 0.0])
    feed(acc, p, rows)
    decision = acc.decide()
    assert decision.accepted.tolist() == [i != place for i in range(4)]
    # ((8 + 16) / 2 + 32) / 2
    assert p.grad.tolist() == [pytest.approx(56 / 3) if average == "mean" else 22.0, 0.0]


def test_a_parameter_without_a_gradient_is_not_touched() -> None:
    """Weight decay and momentum would move it on a gradient of zeros.

    The same holds if only rejected rows had one.
    """
    p, unused, rejected, half = vector(), vector(), vector(), vector()
    acc = gaf.Accumulator(
        SGD([p, unused, rejected, half], 0.1, momentum=0.9, weight_decay=0.1), gaf.GAF(0.5)
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


def test_halving_counts_a_missing_gradient_as_zeros() -> None:
    p, early, late = vector(), vector(), vector()
    acc = gaf.Accumulator(SGD([p, early, late], 0.1), gaf.GAF(0.5, average="halving"))
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


def test_a_row_far_longer_than_the_median_is_absent() -> None:
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.0], [900.0, 90.0], [0.9, 0.1]])
    update, decision = gaf.aggregate(rows, gaf.GAF(0.5, max_norm_ratio=100))
    assert decision.accepted.tolist() == [True, True, False, True]
    assert decision.distances[2].isnan()
    torch.testing.assert_close(update, rows[[0, 1, 3]].mean(0))
    p = nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(0.5, max_norm_ratio=100))
    for row in rows:
        acc.backward(torch.dot(p, row))
    acc.step()
    torch.testing.assert_close(p.data, -update)
    assert acc.stats()["absent"] == 1
    everything, _ = gaf.aggregate(rows, gaf.GAF(0.5))
    assert everything[0] > 200


def test_broken_rows_do_not_move_the_median() -> None:
    rows = torch.tensor(
        [[torch.nan, 0.0], [torch.inf, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [50.0, 0.0]]
    )
    decision = gaf.GAF(0.5, max_norm_ratio=10)(gaf.gram(rows))
    assert decision.accepted.tolist() == [False, False, False, True, True, False]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan"), "10"])
def test_max_norm_ratio_must_be_at_least_one(ratio: object) -> None:
    with pytest.raises(
        ValueError, match="max_norm_ratio must be None or a number of at least 1; got"
    ):
        gaf.GAF(max_norm_ratio=ratio)  # type: ignore[arg-type]


def test_rows_that_count_as_absent_for_their_norm_are_no_evidence() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(20))
    acc = gaf.Accumulator(torch.optim.SGD([p], lr=0.0), gaf.GAF(2.0, max_norm_ratio=5))
    for _ in range(100):
        for i in range(4):
            acc.backward((p * (1 + torch.randn(20)) * (100 if i == 3 else 1)).sum())
        acc.step()
    found = acc.stats()
    assert found["absent"] == 100
    assert 0.8 < found["noise_scale"] < 1.25  # 1, up to sampling
    assert found["norm_dispersion"] < 0.5
