"""K = G G^T, the k x k Gram matrix of the micro-gradients: all that a decision needs.

K adds up over slices of coordinates, so it is built slice by slice from whatever holds the
coordinates: a matrix of rows, or each row as a list of parameter-shaped tensors. There are two
ways:

    exact: multiplied and added in float64, errors below 1e-12, whatever the rows    (this file)
        gram               a matrix of rows              users, gaf.aggregate
        gram_of            lists of tensors              rows that are kept on an accelerator
        products_of        one row with the sum          rows that stream by on an accelerator

    by BLAS in float32, added in float64; faster on a CPU                        (gaf.rules.blas)
        gram_by_blas       a matrix of rows              ranks, gaf.probe
        gram_of_by_blas    lists of tensors              rows that are kept on a CPU
        products_by_blas   one row with the sum          rows that stream by on a CPU, two ranks

    errors by BLAS                on ordinary gradients     if few coordinates hold most of the norm
        matrices, lists           below 1e-7, 5e-7 in bfloat16         below 3e-5
        one row with the sum      below 1e-6                           below 2e-4

Errors are relative to |g_i| |g_j|. On an accelerator both ways multiply in float64.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gaf.rules.slices import HALF, SLICE, Row, fill, float64_device, slices_of, widest
from gaf.shapes import Bool, Float, Float64


def gram(rows: Float[Tensor, "k n"]) -> Float64[Tensor, "k k"]:
    """All inner products of the rows.

        K = G G^T

    Args:
        rows: (k, n), float16, bfloat16, float32 or float64.

    Returns:
        (k, k) float64 on the rows' device, accurate to 1e-12 relative to |g_i| |g_j| at 10 million
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


def gram_of(rows: Sequence[Row], roots: Row | None = None) -> Float64[Tensor, "k k"]:
    """The Gram matrix of rows that are lists of tensors, one per parameter, in the same order.

    roots: the root of a diagonal metric, such as a row; the rows are multiplied by it.
    """
    shares = [lower_products(block) for block in blocks_of(rows, roots)]
    if not shares:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64, device=home_of(rows))
    lower = torch.stack(shares).sum(0)
    return lower + lower.tril(-1).T


def products_of(
    s: Row, g: Row, roots: Row | None = None
) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """<s, g> and |g|^2 of two lists of tensors: two entries of their Gram matrix."""
    shares = []
    for pieces in slices_of([s, g] if roots is None else [s, g, roots]):
        a, b, *root = (v.detach().double() for v in pieces)
        for factor in root:
            a, b = a * factor, b * factor
        shares += [a.dot(b), b.dot(b)]
    if not shares:
        return (zero := torch.zeros((), dtype=torch.float64, device=home_of([g]))), zero
    inner, own = torch.stack(shares).view(-1, 2).sum(0).unbind()
    return inner, own


def home_of(rows: Sequence[Row]) -> torch.device:
    """Where the products of these rows are: of empty ones too, without a transfer."""
    some = next((t for row in rows for t in row if t is not None), None)
    return torch.device("cpu") if some is None else float64_device(some.device)


def blocks_of(
    rows: Sequence[Row],
    roots: Row | None,
    length: int = SLICE,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Float[Tensor, "k c"]]:
    """The slices as matrices.

    On a CPU each block takes the memory of the one before: new memory would cost page faults.

    Args:
        rows: k lists of tensors.
        roots: to multiply each of them by.
        length: of a slice on a CPU.
        dtype: of a block on a CPU, or a wider one that holds the rows' numbers. On other devices it
            is float64, which holds products of half and single precision exactly.
    """
    room: Tensor | None = None
    for columns in slices_of(rows if roots is None else [*rows, roots], length):
        vectors = [v.detach() for v in columns[: len(rows)]]
        root = None if roots is None else columns[-1].to(widest([dtype, columns[-1].dtype]))
        if float64_device(vectors[0].device).type != "cpu":
            block = torch.stack(vectors).double()
            yield block if root is None else block.mul_(root)
            continue
        wide, c = widest([dtype, *(v.dtype for v in columns)]), len(vectors[0])
        if room is None or room.dtype != wide or len(room) < len(rows) * c:
            room = torch.empty(len(rows) * max(c, length), dtype=wide, device="cpu")
        block = fill(room[: len(rows) * c].view(-1, c), vectors)
        yield block if root is None else block.mul_(root)


def lower_products(block: Float64[Tensor, "k c"]) -> Float64[Tensor, "k k"]:
    """block @ block.T with zeros above the diagonal, without waiting for the device.

    On a CPU k products of a matrix and a vector are faster than one of matrices, of which half is
    not needed.
    """
    if block.device.type != "cpu":
        return (block @ block.T).tril()
    lower = block.new_zeros(len(block), len(block))
    for i, row in enumerate(block):
        torch.mv(block[: i + 1], row, out=lower[i, : i + 1])
    return lower


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
