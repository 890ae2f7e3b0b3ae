"""K = G G^T, the k x k Gram matrix of the micro-gradients: all that a decision needs.

K adds up over slices of coordinates, so it is built slice by slice from whatever holds the
coordinates: a matrix of rows, or each row as a list of parameter-shaped tensors. Slices are
multiplied in float32 (float64 rows in float64) and added in float64. There are two ways:

    exact: below 1e-5, whatever the rows        (this file)
        gram               a matrix of rows              users, gaf.aggregate
        gram_of            lists of tensors              rows that are kept on one device
        inner_products     some of the pairs             rows that stream by on an accelerator

    by BLAS: below 1e-6 on ordinary gradients, 1e-4 if few coordinates hold nearly all of the norm,
    and two to three times as fast on a CPU     (gaf.rules.blas)
        gram_by_blas       a matrix of rows              ranks, gaf.probe
        products_by_blas   one row with the sum          rows that stream by on a CPU, two ranks

Errors are relative to |g_i| |g_j|. On an accelerator both ways multiply in float64. On a CPU both
compute anew, more exactly, what left the range that float32 can add up (`in_range`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gaf.rules.slices import HALF, Row, Vectors, half_to_float32, has_float64, slices_of
from gaf.shapes import Bool, Float, Float64

Pairs = Sequence[tuple[int, int]]  # indices of rows


def gram(rows: Float[Tensor, "k n"]) -> Float64[Tensor, "k k"]:
    """All inner products of the rows.

        K = G G^T

    Args:
        rows: (k, n), float16, bfloat16, float32 or float64.

    Returns:
        (k, k) float64 on the rows' device, accurate to 1e-5 relative to |g_i| |g_j| at 10 million
        coordinates. A row that holds a NaN or an infinity, or whose squared norm leaves float64's
        range, has a diagonal entry that is not finite.

    Raises:
        ValueError, TypeError: if `rows` is not a matrix with at least one row of real
            floating-point numbers.

    >>> gram(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
    tensor([[25.,  0.],
            [ 0., 25.]], dtype=torch.float64)
    """
    check_rows(rows)
    return gram_of([[row] for row in rows])


def gram_of(rows: Sequence[Row]) -> Float64[Tensor, "k k"]:
    """The Gram matrix of rows that are lists of tensors, one per parameter, in the same order."""
    k = len(rows)
    found = inner_products(rows, [(i, j) for i in range(k) for j in range(i + 1)])
    # made there: an index from the host would be waited for
    i, j = torch.tril_indices(k, k, device=found.device)
    full = found.new_zeros(k, k)
    full[i, j] = full[j, i] = found
    return full


def inner_products(
    rows: Sequence[Row], pairs: Pairs, in_float64: bool = False
) -> Float64[Tensor, " p"]:
    """<g_i, g_j> for each pair (i, j).

    Args:
        rows: each a tensor per parameter.
        pairs: which products are wanted.
        in_float64: multiply in float64. On a CPU this is done anyway, in a second go, if a squared
            norm among the products turns out to be out of float32's range.
    """
    found = add_slices([products(vectors, pairs, in_float64) for vectors in slices_of(rows)])
    if found.device.type == "cpu" and not in_float64 and not in_range(squared_norms(found, pairs)):
        return inner_products(rows, pairs, in_float64=True)
    if not found.numel():
        return torch.zeros(len(pairs), dtype=torch.float64, device="cpu")
    return found


def add_slices(shares: list[list[Tensor]]) -> Float64[Tensor, " p"]:
    """The inner products from what each slice adds to them; none for no slices."""
    columns = [torch.stack(column) for column in zip(*shares, strict=True)]
    if not columns:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    return torch.stack([column.sum(dtype=torch.float64) for column in columns])


def squared_norms(found: Float64[Tensor, " p"], pairs: Pairs) -> list[float]:
    """Those of the inner products that are of a row with itself."""
    return [value for value, (i, j) in zip(found.tolist(), pairs, strict=False) if i == j]


def in_range(norms2: Iterable[float]) -> bool:
    """Whether no squared norm left float32's range, or lost digits at its lower end."""
    return all(1e-30 < norm2 < 1e38 for norm2 in norms2)


def products(vectors: Vectors, pairs: Pairs, in_float64: bool = False) -> list[Tensor]:
    """One slice's share of the inner products, each ().

    On a CPU pair by pair and by torch's own pairwise sum. The precision of a matrix product is the
    user's to lower (torch.set_float32_matmul_precision), and how a BLAS adds up, and to how many
    digits, depends on the make of the CPU. Elsewhere one float64 product: exact for half and single
    precision, not affected by TF32, and without waiting for the device.
    """
    vectors = [v.detach() for v in vectors]
    device = vectors[0].device
    if device.type == "cpu":
        wide = [v.double() if in_float64 else half_to_float32(v) for v in vectors]
        product = torch.empty_like(wide[0])
        return [torch.mul(wide[i], wide[j], out=product).sum() for i, j in pairs]
    block = torch.stack(vectors).to(device if has_float64(device) else "cpu").double()
    full = block @ block.T
    return [full[i, j] for i, j in pairs]


def is_present(norm2: Float64[Tensor, "*s"]) -> Bool[Tensor, "*s"]:
    """Whether a row counts, by its diagonal entry: a row of zeros, NaN or infinities is absent."""
    return (norm2 > 0) & norm2.isfinite()


def without_giants(gram: Float64[Tensor, "k k"], ratio: float) -> Float64[Tensor, "k k"]:
    """The Gram matrix with zeros for rows that are too long, so that they are absent.

    Too long is a norm of more than `ratio` times the (lower) median of the present rows' norms.
    """
    norms = torch.where(is_present(gram.diagonal()), gram.diagonal().sqrt(), math.nan)
    giant = norms > ratio * norms.nanmedian()
    return torch.where(giant | giant[:, None], 0.0, gram)


def check_rows(rows: Tensor) -> None:
    """TypeError or ValueError if this is no matrix of micro-gradients."""
    if not isinstance(rows, Tensor):
        raise TypeError(
            "rows must be a (k, n) tensor, one micro-gradient a row; "
            f"got {type(rows).__name__}. {way_to_rows(rows)}"
        )
    real = rows.dtype in (*HALF, torch.float32, torch.float64) and rows.layout == torch.strided
    if rows.ndim != 2 or rows.shape[0] < 1 or not real:
        kind = rows.dtype if rows.layout == torch.strided else rows.layout
        raise ValueError(
            "rows must be a (k, n) matrix of float16, bfloat16, float32 or float64 with k >= 1, "
            f"one micro-gradient a row; got shape {tuple(rows.shape)} of {kind}. "
            f"{way_to_rows(rows)}"
        )


def way_to_rows(given: Any) -> str:
    """How to make rows of something else."""
    if not isinstance(given, Tensor):
        numpy = type(given).__module__ == "numpy"
        return "Use torch.from_numpy." if numpy else "Use torch.stack on a list."
    if given.layout != torch.strided:
        return "Use rows.to_dense()."
    if given.is_complex():
        return "Use torch.view_as_real(rows).flatten(1)."
    if given.is_floating_point():
        return "Stack the flattened micro-gradients."
    return "Use rows.float()."


def check_gram(gram: Tensor) -> None:
    """TypeError or ValueError if a policy is given something other than a Gram matrix."""
    if not isinstance(gram, Tensor):
        raise TypeError(
            f"a policy's Gram matrix must be a tensor; got {type(gram).__name__}. "
            "Use gaf.gram(rows)."
        )
    square = gram.ndim == 2 and gram.shape[0] == gram.shape[1] > 0
    if not square or not gram.is_floating_point():
        raise ValueError(
            "a policy's Gram matrix must be a (k, k) float64 tensor of inner products with k >= 1; "
            f"got shape {tuple(gram.shape)} of {gram.dtype}. "
            "Use gaf.gram(rows), or gaf.aggregate(rows, policy)."
        )
