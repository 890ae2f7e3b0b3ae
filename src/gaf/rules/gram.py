"""K = G G^T, the k x k Gram matrix of the micro-gradients: all that a decision needs.

K adds up over slices of coordinates, so it is built piece by piece from whatever holds the coordinates: a matrix of
rows, or each row as a list of parameter-shaped tensors. Pieces are multiplied in float32 (float64 rows in float64)
and added in float64.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gaf.shapes import Bool, Float, Float64

# coordinates in a partial sum on a CPU: few enough for float32's digits, and k rows of them stay in its cache
CHUNK = 2**14
FAST_CHUNK = 2**18  # the same where a row is seen once, as it arrives
DEVICE_CHUNK = 2**22  # an accelerator does few large products faster than many small
SHORT = 2**12  # vectors below this are joined first, to save calls

HALF = (torch.float16, torch.bfloat16)

Row = Sequence[Tensor | None]  # one micro-gradient, a tensor per parameter; None counts as zeros
Vectors = Sequence[Tensor]  # the same coordinates of all k rows, each (c,)


def gram(rows: Float[Tensor, "k n"]) -> Float64[Tensor, "k k"]:
    """All inner products of the rows.

        K = G G^T

    Args:
        rows: (k, n), float16, bfloat16, float32 or float64.

    Returns:
        (k, k) float64 on the rows' device, accurate to 1e-5 relative to |g_i| |g_j| at 10 million coordinates. A row
        that holds a NaN or an infinity, or whose squared norm leaves float64's range, has a diagonal entry that is not
        finite.

    Raises:
        ValueError, TypeError: where `rows` is not a matrix with at least one row of real floating-point numbers.

    >>> gram(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
    tensor([[25.,  0.],
            [ 0., 25.]], dtype=torch.float64)
    """
    check_rows(rows)
    return gram_of([[row] for row in rows])


def present(norm2: Float64[Tensor, "*s"]) -> Bool[Tensor, "*s"]:
    """Whether a row counts, by its diagonal entry: a row of zeros, NaN or infinities is absent."""
    return (norm2 > 0) & norm2.isfinite()


def check_rows(rows: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(
            f"rows must be a (k, n) tensor, one micro-gradient a row; got {type(rows).__name__}. {way_to_rows(rows)}"
        )
    real = rows.dtype in (*HALF, torch.float32, torch.float64) and rows.layout == torch.strided
    if rows.ndim != 2 or rows.shape[0] < 1 or not real:
        kind = rows.dtype if rows.layout == torch.strided else rows.layout
        raise ValueError(
            "rows must be a (k, n) matrix of float16, bfloat16, float32 or float64 with k >= 1, one micro-gradient a row; "
            f"got shape {tuple(rows.shape)} of {kind}. {way_to_rows(rows)}"
        )


def way_to_rows(given: Any) -> str:
    """How to make rows of what is none."""
    if not isinstance(given, Tensor):
        numpy = type(given).__module__ == "numpy"
        return "Use torch.from_numpy." if numpy else "Use torch.stack on a list."
    if given.layout != torch.strided:
        return "Use rows.to_dense()."
    if given.is_complex():
        return "Use torch.view_as_real(rows).flatten(1)."
    return "Stack the flattened micro-gradients." if given.is_floating_point() else "Use rows.float()."  # fmt: skip


def check_gram(gram: Tensor) -> None:
    """TypeError or ValueError where a policy is given what is no Gram matrix."""
    if not isinstance(gram, Tensor):
        raise TypeError(
            f"a policy's Gram matrix must be a tensor; got {type(gram).__name__}. Use gaf.gram(rows)."
        )
    square = gram.ndim == 2 and gram.shape[0] == gram.shape[1] > 0
    if not square or not gram.is_floating_point():
        raise ValueError("a policy's Gram matrix must be a (k, k) float64 tensor of inner products with k >= 1; "
                         f"got shape {tuple(gram.shape)} of {gram.dtype}. Use gaf.gram(rows), or gaf.aggregate(rows, policy).")  # fmt: skip


def gram_of(rows: Sequence[Row]) -> Float64[Tensor, "k k"]:
    """The Gram matrix of rows that are lists of tensors, one per parameter, in the same order in every row."""
    k = len(rows)
    found = inner_products(rows, [(i, j) for i in range(k) for j in range(i + 1)])
    # made there: an index from the host would be waited for
    i, j = torch.tril_indices(k, k, device=found.device)
    full = found.new_zeros(k, k)
    full[i, j] = full[j, i] = found
    return full


def inner_products(
    rows: Sequence[Row], pairs: list[tuple[int, int]], wide: bool = False
) -> Float64[Tensor, " p"]:
    """<g_i, g_j> for the pairs (i, j) of rows that are wanted.

    Args:
        rows: each a tensor per parameter.
        pairs: indices of rows.
        wide: multiply in float64, for rows known to be out of float32's range. A row that turns out to be is done again.
    """
    found = added([products(s, pairs, wide) for s in slices(rows)])
    if found.device.type == "cpu" and not wide and not in_range(found, pairs):
        return inner_products(rows, pairs, wide=True)
    return found if found.numel() else torch.zeros(len(pairs), dtype=torch.float64, device="cpu")


def added(partial: list[list[Tensor]]) -> Float64[Tensor, " p"]:
    columns = [torch.stack(column) for column in zip(*partial, strict=True)]
    return (
        torch.stack([c.sum(dtype=torch.float64) for c in columns])
        if columns
        else torch.zeros(0, dtype=torch.float64, device="cpu")
    )


def in_range(found: Tensor, pairs: list[tuple[int, int]]) -> bool:
    """Whether the squared norms among the products neither left float32's range nor lost digits at its lower end."""
    return all(
        1e-30 < value < 1e38 for value, (i, j) in zip(found.tolist(), pairs, strict=False) if i == j
    )


def products(vectors: Vectors, pairs: list[tuple[int, int]], wide: bool = False) -> list[Tensor]:
    """One slice's share of the inner products, each ().

    On a CPU pair by pair, for a matrix product's precision is the user's to lower (torch.set_float32_matmul_precision), and by
    torch's own pairwise sum, for how a BLAS adds up, and to how many digits, depends on the make of the CPU. Elsewhere one
    float64 product: exact for half and single precision, out of reach of TF32, and without a look at the host.
    """
    vectors = [v.detach() for v in vectors]
    if vectors[0].device.type == "cpu":
        held = [v.double() if wide else v.float() if v.dtype in HALF else v for v in vectors]
        product = torch.empty_like(held[0])
        return [torch.mul(held[i], held[j], out=product).sum() for i, j in pairs]
    block = (
        torch.stack(list(vectors))
        .to(vectors[0].device if has_float64(vectors[0].device) else "cpu")
        .double()
    )
    full = block @ block.T
    return [full[i, j] for i, j in pairs]


def gram_by_blas(rows: Float[Tensor, "k c"]) -> Float64[Tensor, "k k"]:
    """The Gram matrix of a piece that lies as a matrix: on a CPU by matrix products, in a third of the time of `gram`.

    Errors stay below 1e-6 on ordinary gradients and reach 1e-4 where few coordinates hold nearly all. Where the user has
    lowered the precision of matrix products, and out of float32's range, it goes the way of `gram`.
    """
    if rows.device.type == "cpu" and not full_precision():
        return gram_of([[row] for row in rows])
    exact = (
        torch.float64
        if has_float64(rows.device) and rows.device.type != "cpu"
        else torch.promote_types(rows.dtype, torch.float32)
    )
    total = torch.zeros(
        len(rows),
        len(rows),
        dtype=torch.float64,
        device=rows.device if has_float64(rows.device) else "cpu",
    )
    with no_autocast(rows.device.type):  # it would multiply float32 rows in half precision
        for chunk in rows.split(CHUNK if rows.device.type == "cpu" else DEVICE_CHUNK, dim=1):
            block = chunk.to(exact)
            total += (block @ block.T).to(total.device)
    if rows.device.type == "cpu" and not in_range(
        total.diagonal(), [(i, i) for i in range(len(rows))]
    ):
        return gram_of([[row] for row in rows])
    return total


def no_autocast(*kinds: str) -> ExitStack:
    """Context in which these kinds of devices compute in the precision of their tensors."""
    stack = ExitStack()
    for kind in filter(torch.amp.is_autocast_available, sorted({"cpu", *kinds})):
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def full_precision() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for some backends and not for others
        return False


def products_by_blas(s: Tensor | None, g: Tensor, chunk: int = FAST_CHUNK) -> tuple[float, float]:
    """<s, g> and |g|^2 of one parameter on a CPU by dot products: half the time of `products`. No s counts as zeros.

    Errors stay below 1e-6 on ordinary gradients and reach 1e-4 where few coordinates hold nearly all. Out of float32's
    range, and where g is zero or not finite, it looks again in float64.
    """
    flat = [v.float() if v.dtype in HALF else v for v in flatten([g] if s is None else [s, g])]
    inner, own = dots(flat, chunk)
    # s may be smaller still, and the product too small
    small = s is not None and own < 1e-15 and abs(inner) < 1e-30
    if small or not (1e-30 < own < 1e38 and abs(inner) < 1e38):
        inner, own = dots([v.double() for v in flat], chunk)
    return inner, own


def dots(vectors: Vectors, chunk: int) -> tuple[float, float]:
    """Of (s, g): <s, g> and |g|^2; of (g,) alone: 0 and |g|^2."""
    g = vectors[-1]
    cuts = (
        (vectors,) if g.numel() <= chunk else zip(*(v.split(chunk) for v in vectors), strict=True)
    )
    inner = own = 0.0
    for cut in cuts:
        inner += cut[0].dot(cut[1]).item() if len(cut) == 2 else 0.0
        own += cut[-1].dot(cut[-1]).item()
    return inner, own


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def slices(rows: Sequence[Row]) -> Iterator[Vectors]:
    """The rows' coordinates, cut alike: k vectors at a time, long ones as they lie in memory, short ones joined."""
    waiting: list[Vectors] = []
    for part in parts(rows):
        if part[0].numel() >= SHORT:
            yield part
            continue
        if waiting and (
            waiting[0][0].device != part[0].device or sum(p[0].numel() for p in waiting) >= SHORT
        ):
            yield joined(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield joined(waiting)


def joined(parts: list[Vectors]) -> Vectors:
    return [torch.cat(vectors) for vectors in zip(*parts, strict=True)]


def parts(rows: Sequence[Row]) -> Iterator[Vectors]:
    """The rows parameter by parameter, in pieces of at most a chunk."""
    for column in zip(*rows, strict=True):
        shown = next((t for t in column if t is not None), None)
        if shown is not None and shown.numel():
            vectors = flatten([torch.zeros_like(shown) if t is None else t for t in column])
            longest = CHUNK if shown.device.type == "cpu" else DEVICE_CHUNK
            yield from (
                zip(*(v.split(longest) for v in vectors), strict=True)
                if shown.numel() > longest
                else (vectors,)
            )


def flatten(tensors: list[Tensor]) -> Vectors:
    """Vectors whose coordinates stand in the same order; views where every tensor lies in memory the same way."""
    first = tensors[0]
    if first.ndim == 1 and all(t.stride() == (1,) for t in tensors):
        return tensors
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if all(t.stride() == first.stride() for t in tensors):
        # channels_last becomes contiguous
        order = sorted(range(first.ndim), key=first.stride, reverse=True)
        tensors = [t.permute(order) for t in tensors]
    return [t.reshape(-1) for t in tensors]
