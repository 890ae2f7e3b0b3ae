"""Rows that stream by: plain numbers give what tensors give, whatever the rows."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gaf
from gaf.rules.ring import ring_orders
from gaf.rules.sequential import Sequential, walk
from gaf.rules.visits import PlainVisits, Visits, plain_walk, visits_for

CPU = torch.device("cpu")
POLICIES = [gaf.Mean(), *(gaf.GAF(t, average=a) for t in (0.3, 1.0) for a in ("mean", "halving"))]
SPECIAL = st.sampled_from([0.0, 5e-324, 1e-320, 1e160, 1.7e308, math.inf, math.nan])
LENGTHS = st.floats(1e-8, 1e8) | SPECIAL
COSINES = st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0, math.nan])


def bits(visits: Any, row: tuple[float, float]) -> list[Any]:
    joins, shrink = visits.visit(*row)
    return [bool(joins), float(shrink), int(visits.count), float(visits.norm2).hex()]


@given(st.sampled_from(POLICIES), st.lists(st.tuples(LENGTHS, COSINES), min_size=1, max_size=6))
def test_plain_numbers_give_what_tensors_give(
    policy: Sequential, rows: list[tuple[float, float]]
) -> None:
    plain, tensors = PlainVisits(policy), Visits(policy, CPU)
    for own, cosine in rows:
        inner = cosine * math.sqrt(plain.norm2) * math.sqrt(own)
        assert bits(plain, (inner, own)) == bits(tensors, (inner, own))
    found, want = vars(plain.seen()), vars(tensors.seen())
    for name in ("accepted", "norms2", "signals"):
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=0, equal_nan=True)
    # torch's square root can be off by one unit in the last place
    distances = found["distances"], want["distances"]
    torch.testing.assert_close(*distances, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_rows_that_stream_by_are_judged_as_by_the_gram_matrix(policy: Sequential) -> None:
    rows = torch.randn(6, 4).double() + 0.5
    rows[2] = math.nan
    total, visits = torch.zeros(4).double(), PlainVisits(policy)
    for row in rows:
        joins, shrink = visits.visit(float(total @ row), float(row @ row))
        total = (total + row) * shrink if joins else total
    accepted = visits.seen().accepted
    distances = gaf.gram(rows)
    want = policy(distances)
    found = policy.conclude(accepted, visits.seen().distances)
    assert torch.equal(found.accepted, want.accepted)
    torch.testing.assert_close(found.distances, want.distances, equal_nan=True)
    assert visits.norm2 == pytest.approx(float(total @ total))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_every_start_is_walked_in_plain_numbers_as_in_tensors(
    policy: Sequential, bad: float
) -> None:
    for _ in range(20):
        rows = torch.randn(6, 3).double() + 0.3
        rows[2] *= bad
        gram, orders = gaf.gram(rows), ring_orders(6, CPU)
        accepted, *numbers = gram.new_tensor([*plain_walk(policy, gram, orders.tolist())]).unbind(2)
        for found, want in zip(
            (accepted.bool(), *numbers), walk(policy, gram, orders), strict=True
        ):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("start", ["first", "best", "worst"])
@pytest.mark.parametrize("bad", [1.0, 0.0, math.nan])
def test_the_host_decides_as_a_device_does(
    monkeypatch: pytest.MonkeyPatch, average: Any, start: Any, bad: float
) -> None:
    """On random rows, on rows of few values, whose starts often accept equally many, and on rows
    that mostly agree, of which the first start may accept all."""
    for trial in range(40):
        policy = gaf.GAF(0.6 + 0.02 * (trial % 20), start=start, average=average)
        rows = torch.randn(6, 3).double() if trial % 2 else torch.randint(-1, 2, (6, 3)).double()
        rows += 2.0 * (trial % 3 == 0)
        rows[4] *= bad
        gram = gaf.gram(rows)
        found = policy(gram)
        with monkeypatch.context() as patch:
            patch.setattr("gaf.rules.visits.FEW_NUMBERS", 0)
            want = policy(gram)
        assert vars(found).keys() == vars(want).keys()
        for name, value in vars(found).items():
            if name == "distances":
                torch.testing.assert_close(value, want.distances, equal_nan=True)
            else:
                assert torch.equal(value, getattr(want, name)), name


def test_a_rule_of_its_own_is_asked_with_tensors() -> None:
    class Own(gaf.Mean):
        def visit(self, *seen: Any) -> Any:
            assert all(isinstance(one, torch.Tensor) for one in seen)
            return super().visit(*seen)

    assert isinstance(visits_for(gaf.Mean(), CPU), PlainVisits)
    assert isinstance(visits_for(gaf.Mean(), torch.device("meta")), Visits)
    visits = visits_for(Own(), CPU)
    assert visits.visit(0.0, 0.1)[0]
    assert float(visits.norm2) == 0.1  # not rounded to float32
