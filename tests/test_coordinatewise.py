"""Median, TrimmedMean, SignAgreement and RandomMask, against float64 on the stacked rows."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gaf
from gaf.rules.order import comparisons, ranked_rows
from gaf.rules.slices import CHUNK
from helpers.by_coordinate import RULES, expected_update
from helpers.oracle import flat
from test_weights import accumulated


def make(name: str, **options: Any) -> Any:
    return RULES[name][0](**options)


def broken_rows(k: int, n: int, bad: list[float]) -> Tensor:
    """k rows of which the first ones are nothing but zeros, NaN or infinities."""
    rows = torch.randn(k, n)
    for row, value in zip(rows, bad, strict=False):
        row[:] = 0.0
        row[n // 2] = value
    return rows


BAD = [[], [math.nan], [0.0, math.inf], [math.nan, 0.0, -math.inf]]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("bad", BAD)
def test_the_update_is_the_rules_on_the_present_rows(name: str, k: int, bad: list[float]) -> None:
    rows = broken_rows(k, 50, bad)
    expected = expected_update(name, rows)
    update, decision = gaf.aggregate(rows, make(name))
    assert bool(decision.stepped) == (expected is not None)
    if expected is None:
        expected = torch.zeros(50)
        assert not decision.accepted.any()
    else:
        assert decision.accepted.tolist() == [i >= len(bad) for i in range(k)]
    # sums of at most 8 float32
    torch.testing.assert_close(update.double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(
        decision.distances.nan_to_num(-1), gaf.Mean()(gaf.gram(rows)).distances.nan_to_num(-1)
    )


def test_of_an_odd_number_of_rows_the_median_is_torchs_own() -> None:
    rows = torch.randn(7, 1000)
    assert torch.equal(gaf.aggregate(rows, gaf.Median())[0], rows.median(0).values)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    rows = (100 * torch.randn(4, 200)).to(dtype)
    expected = expected_update(name, rows)
    assert expected is not None
    update, _ = gaf.aggregate(rows, make(name))
    assert update.dtype == dtype
    torch.testing.assert_close(update, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_a_single_row_is_taken_as_it_is(name: str) -> None:
    rows = torch.randn(1, 9)
    update, decision = gaf.aggregate(rows, make(name))
    assert decision.stepped
    assert torch.equal(update, rows[0])


@pytest.mark.parametrize("name", RULES)
def test_long_rows_are_cut_and_left_as_they_were(name: str) -> None:
    rows = torch.randn(4, 2 * CHUNK + 5)
    before = rows.clone()
    update, _ = gaf.aggregate(rows, make(name))
    expected = expected_update(name, rows)
    torch.testing.assert_close(update.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rows, before)


# -------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("r", range(1, 9))
def test_the_network_sorts_every_row_of_zeros_and_ones(r: int) -> None:
    """Then it sorts whatever there is (Knuth's 0-1 principle)."""
    columns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=r))).T
    expected = columns.sort(0).values
    assert torch.equal(torch.stack(ranked_rows(columns.clone(), range(r))), expected)
    for rank in range(r):
        assert torch.equal(ranked_rows(columns.clone(), [rank])[0], expected[rank])


def test_ranks_that_are_not_wanted_save_comparisons() -> None:
    assert len(comparisons(8, tuple(range(8)))) == 19
    assert len(comparisons(8, (3, 4))) < 19
    assert comparisons(1, (0,)) == ()


# -------------------------------------------------------------------------------------- one device


class Net(nn.Module):
    """A parameter in another order of memory, one that some rows do not use, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.some, self.gain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, used: bool) -> Tensor:
        h = self.conv(x).mean((2, 3)) * self.gain
        return ((h * self.some if used else h) ** 2).mean()


def row_of(model: nn.Module, x: Tensor, used: bool) -> Tensor:
    grads = torch.autograd.grad(
        model(x, used), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize("name", RULES)
def test_the_accumulator_steps_with_the_rules_update(name: str) -> None:
    model = Net()
    before = flat(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 1.0), make(name))
    xs = [(torch.randn(2, 2, 5, 5), i != 1) for i in range(4)]
    rows = torch.stack([row_of(model, x, used) for x, used in xs])
    for x, used in xs:
        acc.backward(model(x, used))
    acc.step()
    moved = before - flat(model)
    expected = expected_update(name, rows)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-6)
    assert acc.stats()["accepted"] == 4


def test_each_layer_may_have_its_own_present_rows() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 1, bias=False), "b": nn.Linear(3, 1, bias=False)})
    before = [p.detach().clone() for p in model.parameters()]
    policy = gaf.Median(scope="layer")
    acc = gaf.Accumulator(SGD(model.parameters(), 1.0), policy, model=model)
    rows = torch.randn(4, 2, 3)
    rows[0, 0, 1] = math.nan
    for a, b in rows:
        acc.backward(model["a"](a).sum() + model["b"](b).sum())
    acc.step()
    for p, old, part in zip(model.parameters(), before, rows.unbind(1), strict=True):
        expected = expected_update("Median", part)
        assert expected is not None
        torch.testing.assert_close((old - p.detach()).double()[0], expected, rtol=1e-5, atol=1e-6)


def test_a_skip_moves_nothing() -> None:
    moved, acc = accumulated(broken_rows(3, 5, [math.nan, math.nan]), gaf.SignAgreement(2))
    assert moved.tolist() == [0.0] * 5
    stats = acc.stats()
    assert [stats[name] for name in ("stepped", "rejected", "absent")] == [0, 1, 2]


# ------------------------------------------------------------------------------------- random mask


def test_a_random_mask_keeps_a_share_of_the_mean_and_another_one_each_step() -> None:
    rows, policy = torch.rand(3, 100_000) + 0.5, gaf.RandomMask(0.3, seed=4)
    masks = []
    for _ in range(3):
        update, _ = gaf.aggregate(rows, policy)
        masks.append(update != 0)
        torch.testing.assert_close(update, rows.mean(0) * masks[-1])
        # six standard deviations
        assert abs(masks[-1].double().mean() - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 100_000)
    for a, b in itertools.pairwise(masks):
        assert abs((a & b).double().mean() - 0.09) < 6 * math.sqrt(0.09 * 0.91 / 100_000)


def test_a_mask_depends_on_the_place_alone() -> None:
    policy, device = gaf.RandomMask(0.5), torch.device("cpu")
    whole = policy.mask(0, 1000, device)
    assert torch.equal(
        torch.cat([policy.mask(0, 300, device), policy.mask(300, 700, device)]), whole
    )
    assert not torch.equal(gaf.RandomMask(0.5, seed=1).mask(0, 1000, device), whole)


def test_a_random_mask_goes_on_from_its_state() -> None:
    rows, policy = torch.randn(3, 100), gaf.RandomMask(0.5)
    gaf.aggregate(rows, policy)
    resumed = gaf.RandomMask(0.5)
    resumed.load_state_dict(copy.deepcopy(policy.state_dict()))
    assert torch.equal(gaf.aggregate(rows, policy)[0], gaf.aggregate(rows, resumed)[0])
    with pytest.raises(ValueError, match="must be of a RandomMask"):
        resumed.load_state_dict({"tau": 1})


def test_an_accumulator_keeps_its_own_count_of_steps() -> None:
    policy = gaf.RandomMask(0.5)
    accumulated(torch.randn(2, 5), policy)
    assert policy.step == 0


REFUSED = [
    (lambda: gaf.TrimmedMean(-1), "TrimmedMean: trim must be a whole number of at least 0; got -1"),
    (lambda: gaf.SignAgreement(0.5), "SignAgreement: at_least must be a whole number .*; got 0.5"),
    (lambda: gaf.RandomMask(0), r"keep_probability must lie in \(0, 1\]; got 0"),
    (lambda: gaf.RandomMask(0.5, seed=0.5), "RandomMask: seed must be a whole number"),
    (lambda: gaf.Median(scope="rank"), "Median: scope must be one of 'all', 'group', 'layer'"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_arguments_out_of_range_are_refused(call: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        call()
