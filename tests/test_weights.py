"""Policies that return plain weights: what Decision they stand for, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gaf

ROWS = torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 1.0], [-1.0, 1.0, 1.0]])
WITH_NAN = torch.cat([ROWS[:1], torch.full((1, 3), math.nan), ROWS[1:]])


def returns(weights: Any) -> Callable[[Tensor], Any]:
    return lambda gram: weights


def accumulated(rows: Tensor, policy: Any) -> tuple[Tensor, gaf.Accumulator]:
    """The update that the Accumulator steps with."""
    p = nn.Parameter(torch.zeros(rows.shape[1]))
    acc = gaf.Accumulator(SGD([p], 1.0), policy)
    for row in rows:
        acc.backward(torch.dot(p, row))
    acc.step()
    return -p.data, acc


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_a_decision_that_accepts_what_has_one(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.5, 0.0, -2.0], dtype=dtype).requires_grad_()
    update, decision = gaf.aggregate(ROWS, returns(weights))
    assert decision.weights.tolist() == [0.5, 0.0, -2.0]
    assert decision.weights.dtype == torch.float64
    assert not decision.weights.requires_grad
    assert decision.accepted.tolist() == [True, False, True]
    assert decision.stepped
    assert update.tolist() == (0.5 * ROWS[0] - 2 * ROWS[2]).tolist()
    assert torch.equal(decision.distances, gaf.Mean()(gaf.gram(ROWS)).distances)


def test_weights_that_are_all_zero_are_a_skip() -> None:
    update, decision = gaf.aggregate(ROWS, returns(torch.zeros(3)))
    assert not decision.stepped
    assert update.tolist() == [0, 0, 0]
    moved, acc = accumulated(ROWS, returns(torch.zeros(3)))
    assert moved.tolist() == [0, 0, 0]
    assert (acc.stats()["stepped"], acc.stats()["rejected"]) == (0, 3)


def test_the_accumulator_takes_weights() -> None:
    moved, acc = accumulated(ROWS, returns(torch.tensor([0.5, 0.0, -2.0])))
    assert moved.tolist() == (0.5 * ROWS[0] - 2 * ROWS[2]).tolist()
    stats = acc.stats()
    assert [stats[name] for name in ("accepted", "rejected", "absent")] == [2, 1, 0]


def test_an_absent_rows_weight_counts_as_zero() -> None:
    update, decision = gaf.aggregate(WITH_NAN, returns(torch.full((4,), 0.25)))
    assert decision.weights.tolist() == [0.25, 0, 0.25, 0.25]
    assert decision.distances.isnan().tolist() == [False, True, False, False]
    assert update.tolist() == (0.25 * ROWS.sum(0)).tolist()


class InverseNorms:
    """Looks at present rows only."""

    present_only = True

    def __call__(self, gram: Tensor) -> Tensor:
        return 1 / gram.diagonal().sqrt() / len(gram)


def test_a_policy_may_be_given_the_present_rows_alone() -> None:
    update, decision = gaf.aggregate(WITH_NAN, InverseNorms())
    expected = torch.nn.functional.normalize(ROWS.double()).mean(0)
    torch.testing.assert_close(update.double(), expected, rtol=1e-6, atol=0)
    assert decision.accepted.tolist() == [True, False, True, True]
    assert accumulated(WITH_NAN, InverseNorms())[1].stats()["absent"] == 1
    _, none = gaf.aggregate(torch.full((2, 3), math.nan), InverseNorms())
    assert (bool(none.stepped), none.distances.isnan().all().item()) == (False, True)


def test_a_decision_about_the_present_rows_alone_is_one_about_all() -> None:
    policy = gaf.GAF(0.9)
    rule = type("Rule", (), {"present_only": True, "__call__": lambda self, gram: policy(gram)})()
    found, expected = gaf.aggregate(WITH_NAN, rule)[1], gaf.aggregate(WITH_NAN, policy)[1]
    for name, part in vars(expected).items():
        assert torch.equal(getattr(found, name).nan_to_num(-1), part.nan_to_num(-1)), name


def test_a_module_is_given_the_present_rows_alone() -> None:
    class Longest(nn.Module):
        def forward(self, gram: Tensor) -> Tensor:
            return (gram.diagonal() == gram.diagonal().max()).float()

    update, _ = gaf.aggregate(torch.tensor([[1.0, 1.0], [math.inf, 0.0], [2.0, 2.0]]), Longest())
    assert update.tolist() == [2, 2]


def test_what_a_policy_draws_depends_on_the_rows_and_leaves_the_generator_alone() -> None:
    def draw(gram: Tensor) -> Tensor:
        return torch.rand(len(gram))

    torch.manual_seed(1)
    first = gaf.aggregate(ROWS, draw)[1].weights
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(gaf.aggregate(ROWS, draw)[1].weights, first)
    assert not torch.equal(gaf.aggregate(2 * ROWS, draw)[1].weights, first)


WRONG = [
    (torch.ones(2), r"one for each of the 3 rows; got shape \(2,\) of torch.float32"),
    (torch.ones(3, 1), r"got shape \(3, 1\)"),
    (torch.ones(3, dtype=torch.bool), "of torch.bool"),
    (torch.ones(3, dtype=torch.int64), "of torch.int64"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG)
def test_what_is_no_weights_is_refused(weights: Tensor, message: str) -> None:
    for engine in (gaf.aggregate, accumulated):
        with pytest.raises(ValueError, match=f"plain weights must .*{message}"):
            engine(ROWS, returns(weights))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="must have finite weights"):
        accumulated(ROWS, returns(torch.tensor([bad, 1.0, 0.0])))
