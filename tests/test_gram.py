"""gaf.gram: closed forms, every dtype, accuracy at length and range, any memory layout."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gaf
from gaf.rules.blas import gram_by_blas, gram_of_by_blas
from gaf.rules.gram import gram_of
from gaf.rules.slices import SLICE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MILLIONS = 10_000_000


def dense(rows: torch.Tensor) -> torch.Tensor:
    return rows.double() @ rows.double().T


def dense_in_parts(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([dense(part) for part in rows.split(10_000, dim=1)]).sum(0)


def relative_error(found: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error of an entry relative to |g_i| |g_j|."""
    norms = want.diagonal().sqrt()
    return ((found - want).abs() / (norms[:, None] * norms)).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_3_4_5_triangle_has_gram_25_in_every_dtype(dtype: torch.dtype) -> None:
    found = gaf.gram(torch.tensor([[3, 4], [4, -3], [-3, -4]], dtype=dtype))
    assert found.dtype == torch.float64
    assert found.tolist() == [[25, 0, -25], [0, 25, 0], [-25, 0, 25]]


@pytest.mark.parametrize("angle", [0.0, 0.1, 1.0, math.pi / 2, 3.0, math.pi])
def test_unit_vectors_at_an_angle_have_its_cosine_as_inner_product(angle: float) -> None:
    found = gaf.gram(
        torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    )
    want = [[1.0, math.cos(angle)], [math.cos(angle), 1.0]]
    # a few roundings of numbers below 1
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-15)


def test_one_row_gives_its_squared_norm() -> None:
    assert gaf.gram(torch.tensor([[1.0, 2.0, 2.0]])).tolist() == [[9.0]]


@given(
    st.lists(st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=1, max_size=6),
    st.sampled_from(DTYPES),
)
def test_integer_rows_are_exact_in_every_dtype(rows: list[list[int]], dtype: torch.dtype) -> None:
    """Integers below 128 are exact even in bfloat16, and so are their products once widened."""
    found = gaf.gram(torch.tensor(rows, dtype=dtype))
    assert found.tolist() == [
        [sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gram_matrix_is_exactly_symmetric(dtype: torch.dtype) -> None:
    found = gaf.gram(torch.randn(7, 1001).to(dtype))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("kind", ["normal", "all positive"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_million_coordinates_are_accurate_to_1e_12(dtype: torch.dtype, kind: str) -> None:
    """Terms of like sign make a plain float32 sum drift: by 7.5e-4 at half this length."""
    rows = torch.randn(2, MILLIONS)
    rows = (rows.abs_().add_(0.5) if kind == "all positive" else rows).to(dtype)
    # what gram's docstring promises
    assert relative_error(gaf.gram(rows), dense_in_parts(rows)) < 1e-12


def test_ten_million_coordinates_with_a_heavy_head_are_accurate_to_1e_12() -> None:
    """One coordinate in 10,000 is 1, the others 1e-3: a sum of some ones rounds their 1e-6 off."""
    rows = torch.full((2, MILLIONS), 1e-3)
    rows[:, ::10_000] = 1.0
    assert relative_error(gaf.gram(rows), dense_in_parts(rows)) < 1e-12


def test_float16_squares_do_not_overflow() -> None:
    assert (
        gaf.gram(torch.full((2, 4), 60_000, dtype=torch.float16)).tolist()
        == [[4 * 60_000**2] * 2] * 2
    )


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_float32_rows_out_of_the_range_of_float32_squares_are_as_accurate(scale: float) -> None:
    rows = torch.randn(3, 1000) * scale
    assert relative_error(gaf.gram(rows), dense(rows)) < 1e-13


def test_a_huge_a_tiny_and_an_ordinary_row_together_are_accurate() -> None:
    rows = torch.randn(3, 1000) * torch.tensor([[1e25], [1e-25], [1.0]])
    assert relative_error(gaf.gram(rows), dense(rows)) < 1e-13


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_marks_its_own_diagonal_alone(
    dtype: torch.dtype, bad: float
) -> None:
    rows = torch.randn(3, 5).to(dtype)
    rows[1, 2] = bad
    assert gaf.gram(rows).diagonal().isfinite().tolist() == [True, False, True]


def test_the_largest_finite_float32_is_not_taken_for_an_infinity() -> None:
    assert gaf.gram(torch.full((2, 3), torch.finfo(torch.float32).max)).isfinite().all()


@pytest.mark.parametrize("cuts", [[0], [1], [500, 1], [999, 3, 2000], [SLICE - 1, 2, SLICE]])
def test_gram_adds_up_over_slices_wherever_they_are_cut(cuts: list[int]) -> None:
    rows = torch.randn(4, sum(cuts) + 17)
    pieces = rows.split([*cuts, 17], dim=1)
    assert (
        relative_error(
            sum(map(gaf.gram, pieces), torch.zeros(4, 4, dtype=torch.float64)), gaf.gram(rows)
        )
        < 1e-13
    )


@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_a_row_cut_into_parameters_is_the_same_row(k: int, sizes: list[int], rng: object) -> None:
    """Of integers, so that both are exact. Empty parameters take part."""
    rows = torch.tensor(
        [[rng.randint(-9, 9) for _ in range(sum(sizes))] for _ in range(k)], dtype=torch.float32
    )  # type: ignore[attr-defined]
    rows = rows.reshape(k, sum(sizes))
    assert torch.equal(gram_of([list(row.split(sizes)) for row in rows]), gaf.gram(rows))


def test_rows_without_coordinates_have_gram_zero() -> None:
    assert gaf.gram(torch.zeros(3, 0)).tolist() == [[0.0] * 3] * 3
    assert gram_of([[torch.zeros(0), torch.zeros(2, 0)]] * 2).tolist() == [[0.0] * 2] * 2


def test_none_counts_as_zeros() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    assert gram_of([[a, None], [None, b], [a, b], [None, None]]).tolist() == [
        [5, 0, 5, 0],
        [0, 9, 9, 0],
        [5, 9, 14, 0],
        [0, 0, 0, 0],
    ]
    assert gram_of([[None], [None]]).tolist() == [[0, 0], [0, 0]]


def test_parameters_of_different_dtypes_add_up() -> None:
    row = [torch.ones(2, dtype=dtype) for dtype in DTYPES]
    assert gram_of([row, [2 * t for t in row]]).tolist() == [[8, 16], [16, 32]]


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_the_memory_layout_of_a_row_does_not_matter(first: str, second: str) -> None:
    a, b = (
        LAYOUTS[first](torch.randint(-9, 9, (3, 4, 5, 2)).float()),
        LAYOUTS[second](torch.randint(-9, 9, (3, 4, 5, 2)).float()),
    )
    want = dense(torch.stack([a.reshape(-1), b.reshape(-1)]))  # reshape reads in logical order
    assert torch.equal(gram_of([[a], [b]]), want)  # integers: exact


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_none_beside_any_layout_counts_as_zeros(layout: str) -> None:
    a = LAYOUTS[layout](torch.randint(-9, 9, (3, 4, 5, 2)).float())
    assert gram_of([[a], [None]]).tolist() == [[a.square().sum().item(), 0], [0, 0]]


def test_columns_of_a_matrix_can_be_rows() -> None:
    rows = torch.randint(-9, 9, (50, 3)).float()
    assert torch.equal(gaf.gram(rows.T), dense(rows.T))


def test_gram_asks_nothing_of_the_host_off_the_cpu() -> None:
    """The meta device has no values: whatever wanted one would raise."""
    assert gaf.gram(torch.empty(4, 1000, device="meta")).shape == (4, 4)
    assert gram_of(
        [[torch.empty(3, device="meta"), None], [None, torch.empty(2, 2, device="meta")]]
    ).shape == (2, 2)


STACK = "Stack the flattened micro-gradients."


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rows", "seen", "fix"),
    [
        (torch.zeros(3), "torch.float32", STACK),
        (torch.zeros(2, 2, 2), "torch.float32", STACK),
        (torch.zeros(0, 3), "torch.float32", STACK),
        (torch.zeros(2, 3, dtype=torch.int64), "torch.int64", "Use rows.float()."),
        (torch.zeros(2, 3, dtype=torch.bool), "torch.bool", "Use rows.float()."),
        (
            torch.zeros(2, 3, dtype=torch.complex64),
            "torch.complex64",
            "Use torch.view_as_real(rows).flatten(1).",
        ),
        (torch.eye(3).to_sparse(), "torch.sparse_coo", "Use rows.to_dense()."),
    ],
    ids=["vector", "cube", "no rows", "integers", "bool", "complex", "sparse"],
)
def test_what_is_no_real_matrix_is_refused_by_name_shape_and_dtype(
    rows: torch.Tensor, seen: str, fix: str
) -> None:
    for call in (gaf.gram, lambda r: gaf.aggregate(r, gaf.Mean())):
        with pytest.raises(
            ValueError,
            match=r"rows must be a \(k, n\) matrix of float16, bfloat16, float32 or float64",
        ) as caught:
            call(rows)
        assert f"got shape {tuple(rows.shape)} of {seen}. {fix}" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([torch.ones(2)], "got list. Use torch.stack on a list."),
        (torch.ones(2, 2).numpy(), "got ndarray. Use torch.from_numpy."),
        (None, "got NoneType. Use torch.stack on a list."),
    ],
)
def test_what_is_no_tensor_is_refused(rows: Any, message: str) -> None:
    for call in (gaf.gram, lambda r: gaf.aggregate(r, gaf.Mean())):
        with pytest.raises(TypeError, match=message):
            call(rows)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "policy", [gaf.GAF(0.9), gaf.GAF(0.9, start="best"), gaf.Mean(), gaf.RandomSkip(0.5)], ids=repr
)
@pytest.mark.parametrize(
    ("gram", "error", "message"),
    [
        ([[1.0]], TypeError, "a policy's Gram matrix must be a tensor; got list. Use gaf.gram"),
        (
            torch.ones(2, 3).double(),
            ValueError,
            r"must be a \(k, k\) float64 tensor .* got shape \(2, 3\)",
        ),
        (torch.zeros(0, 0).double(), ValueError, r"with k >= 1; got shape \(0, 0\)"),
        (torch.eye(2, dtype=torch.int64), ValueError, "got shape .* of torch.int64. Use gaf.gram"),
    ],
)
def test_a_policy_refuses_what_is_no_gram_matrix(
    policy: Any, gram: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        policy(gram)


BLAS_WAYS = {
    "matrix": gram_by_blas,
    "parameters": lambda rows: gram_of_by_blas(
        [row.split([7, 40_000, *[500] * 3]) for row in rows]
    ),
}


@pytest.mark.parametrize("k", [1, 2, 5, 8, 70])
@pytest.mark.parametrize("way", BLAS_WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_blas_the_error_stays_below_1e_7(dtype: torch.dtype, way: str, k: int) -> None:
    """Squares of bfloat16 have so few digits that their roundings have a bias."""
    rows = (torch.randn(k, 41_507) + torch.randn(41_507)).to(dtype)
    found = BLAS_WAYS[way](rows)
    assert found.dtype == torch.float64
    assert relative_error(found, dense(rows)) < (5e-7 if dtype == torch.bfloat16 else 1e-7)


@pytest.mark.parametrize("way", BLAS_WAYS)
def test_by_blas_the_error_stays_below_3e_5_where_few_coordinates_are_all_of_the_norm(
    way: str,
) -> None:
    """One coordinate in 10,000 is 1; the squares of the others are rounded off beside it."""
    rows = torch.full((3, 41_507), 1e-3)
    rows[:, ::10_000] = 1.0
    assert relative_error(BLAS_WAYS[way](rows), dense(rows)) < 3e-5  # PIECE x 2^-24


@pytest.mark.parametrize("way", BLAS_WAYS)
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_by_blas_numbers_out_of_range_are_multiplied_exactly(way: str, scale: float) -> None:
    rows = torch.randn(3, 41_507) * scale
    assert relative_error(BLAS_WAYS[way](rows), dense(rows)) < 1e-13


def test_by_blas_a_row_that_is_not_finite_marks_its_own_diagonal_alone() -> None:
    rows = torch.randn(3, 41_507)
    rows[1, 2] = math.nan
    for way in BLAS_WAYS.values():
        assert way(rows).diagonal().isfinite().tolist() == [True, False, True]


def test_by_blas_few_coordinates_are_exact_and_missing_ones_zeros() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    rows = [[a, None], [None, b], [a, b.double()]]
    assert gram_of_by_blas(rows).tolist() == [[5, 0, 5], [0, 9, 9], [5, 9, 14]]
    assert gram_of_by_blas([[None], [None]]).tolist() == [[0, 0], [0, 0]]


def test_autocast_does_not_touch_the_matrix_products() -> None:
    """In bfloat16 they would be off by 3e-3."""
    rows = torch.randn(6, 5000)
    want = gram_by_blas(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_by_blas(rows), want)
        assert torch.equal(gram_of_by_blas([[row] for row in rows]), want.tril() + want.tril(-1).T)
        assert torch.equal(gaf.gram(rows), gaf.gram(rows.clone()))


def test_the_type_checks_are_on() -> None:
    """Else every shape in these tests would go unchecked."""
    with pytest.raises(TypeError, match="Type-check error"):
        gaf.GAF(0.5)(torch.eye(2))  # float32 where the Gram matrix is float64
    with pytest.raises(TypeError, match="Type-check error"):
        gaf.GAF(0.5)(torch.zeros(2, 3, dtype=torch.float64))
