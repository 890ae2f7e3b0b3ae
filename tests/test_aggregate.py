"""gaf.aggregate and the sums behind it: w^T G, and nothing of what has weight zero."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gaf
from gaf.rules.combine import combine

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_has_the_rows_dtype_and_shape(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 17).to(dtype)
    for policy in (
        gaf.GAF(2.0),
        gaf.GAF(0.0),
        gaf.Mean(),
        gaf.GAF(2.0, start="best", average="halving"),
    ):
        update, decision = gaf.aggregate(rows, policy)
        assert update.dtype == dtype
        assert update.shape == (17,)
        assert decision.weights.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skip_gives_a_zero_update(dtype: torch.dtype) -> None:
    update, decision = gaf.aggregate(torch.tensor([[1, 0], [-1, 0]], dtype=dtype), gaf.GAF(0.5))
    assert not decision.stepped
    assert update.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_weight_zero_is_never_multiplied(dtype: torch.dtype, bad: float) -> None:
    rows = torch.tensor([[bad, 1], [2, 4], [4, 2], [bad, bad]], dtype=dtype)
    update, decision = gaf.aggregate(rows, gaf.GAF(0.5))
    assert decision.accepted.tolist() == [False, True, True, False]
    assert update.tolist() == [3, 3]


def test_a_skip_does_not_touch_rows_that_are_not_finite() -> None:
    update, _ = gaf.aggregate(torch.full((3, 2), math.nan), gaf.GAF(0.5))
    assert update.tolist() == [0, 0]


def test_a_row_with_a_weight_lets_its_nan_through() -> None:
    update, _ = gaf.aggregate(torch.tensor([[math.nan, 1.0], [3.0, 3.0]]), gaf.Mean())
    assert update.isnan().tolist() == [True, False]
    assert update[1] == 2


def test_half_precision_adds_in_float32() -> None:
    """In float16, 2048 + 1 is 2048, and 60000 + 60000 is infinite."""
    rows = torch.tensor([[2048.0, 60000.0]] + [[1.0, 60000.0]] * 15, dtype=torch.float16)
    update, _ = gaf.aggregate(rows, gaf.GAF(2.0))
    assert update.tolist() == [torch.tensor(2063 / 16, dtype=torch.float16).item(), 60000.0]
    # 1000 float32 roundings of sums below 1 are far below bfloat16's own half step of 2^-9
    assert (
        combine(
            torch.full((1000,), 1e-3, dtype=torch.float64),
            torch.ones(1000, 1, dtype=torch.bfloat16),
        ).item()
        == 1.0
    )


@given(
    st.lists(st.lists(st.integers(-100, 100), min_size=3, max_size=3), min_size=1, max_size=5),
    st.data(),
)
def test_combine_is_the_weighted_sum(rows: list[list[int]], data: st.DataObject) -> None:
    """With weights that are multiples of 1/8 it is exact in float32."""
    weights = data.draw(
        st.lists(st.integers(0, 8).map(lambda w: w / 8), min_size=len(rows), max_size=len(rows))
    )
    found = combine(
        torch.tensor(weights, dtype=torch.float64), torch.tensor(rows, dtype=torch.float32)
    )
    assert found.tolist() == [
        math.fsum(w * row[j] for w, row in zip(weights, rows, strict=True)) for j in range(3)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rows_are_left_as_they_were(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 5, dtype=dtype)
    before = rows.clone()
    gaf.aggregate(rows, gaf.GAF(2.0))
    assert torch.equal(rows, before)


def test_a_policy_is_any_callable_from_a_gram_matrix_to_a_decision() -> None:
    def the_longest(gram: torch.Tensor) -> gaf.Decision:
        chosen = torch.arange(len(gram)) == gram.diagonal().argmax()
        return gaf.Decision(
            chosen.double(), chosen, torch.tensor(True), torch.zeros(len(gram), dtype=torch.float64)
        )

    update, decision = gaf.aggregate(
        torch.tensor([[1.0, 1.0], [3.0, 4.0], [2.0, 2.0]]), the_longest
    )
    assert update.tolist() == [3, 4]
    assert decision.accepted.tolist() == [False, True, False]


def test_aggregate_asks_nothing_of_the_host_off_the_cpu() -> None:
    """The meta device has no values: whatever wanted one would raise."""
    update, decision = gaf.aggregate(
        torch.empty(4, 9, dtype=torch.bfloat16, device="meta"), gaf.GAF(0.9)
    )
    assert (update.shape, update.dtype, update.device.type, decision.stepped.device.type) == (
        (9,),
        torch.bfloat16,
        "meta",
        "meta",
    )


def test_rows_that_require_grad_are_filtered_like_any_others() -> None:
    rows = torch.randn(3, 5)
    assert torch.equal(gaf.gram(rows.clone().requires_grad_()), gaf.gram(rows))
    assert (
        gaf.aggregate(rows.clone().requires_grad_(), gaf.GAF(2.0))[1].weights.tolist()
        == [1 / 3] * 3
    )


def test_what_is_no_matrix_or_no_policy_is_refused(unchecked: None) -> None:
    rows = torch.randn(3, 5)
    with pytest.raises(
        TypeError,
        match=r"rows must be a \(k, n\) tensor, .* got list. Use torch.stack",
    ):
        gaf.aggregate(list(rows), gaf.GAF())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError,
        match="aggregate: policy must be a callable from a Gram matrix to a Decision; got 0.97",
    ):
        gaf.aggregate(rows, 0.97)  # type: ignore[arg-type]
