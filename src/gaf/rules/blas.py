"""The Gram matrix by BLAS: fast and less exact, for rows that a step has to look at in passing.

The table in `gaf.rules.gram` shows who uses it, and the errors.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from gaf.rules.gram import blocks_of, gram_of
from gaf.rules.slices import (
    DEVICE_CHUNK,
    HALF,
    Row,
    Vectors,
    chunk_on,
    flatten,
    float64_device,
    half_to_float32,
    has_float64,
    split,
)
from gaf.shapes import Float, Float64

PIECE = 2**9  # coordinates that are added up in float32 on a CPU
BLOCK = 2**19  # numbers that are multiplied at a time on a CPU: they stay in its cache
ARRIVING_CHUNK = 2**18  # coordinates in a partial sum of a row that is seen once, as it arrives


def gram_by_blas(
    rows: Float[Tensor, "k c"], roots: Float[Tensor, " c"] | None = None
) -> Float64[Tensor, "k k"]:
    """The Gram matrix of a piece that lies as a matrix; in half the time of `gram` on a CPU.

    The exact way is taken if the user has lowered the precision of matrix products, and if the
    result is out of float32's range.

    roots: of a diagonal metric; the rows are multiplied by it.
    """
    if roots is not None:
        size = max(ARRIVING_CHUNK, chunk_on(rows.device))
        parts = zip(rows.split(size, dim=1), roots.split(size), strict=True)
        return torch.stack([gram_by_blas(part * root) for part, root in parts]).sum(0)
    on_cpu = rows.device.type == "cpu"
    if on_cpu and not full_precision():
        return gram_of([[row] for row in rows])
    found = matrix_product(rows)
    if on_cpu and not in_range(found.diagonal().tolist()):
        return gram_of([[row] for row in rows])
    return found


def in_range(norms2: Iterable[float]) -> bool:
    """Whether no squared norm left float32's range, or lost digits at its lower end."""
    return all(1e-30 < norm2 < 1e38 for norm2 in norms2)


def gram_of_by_blas(rows: Sequence[Row], roots: Row | None = None) -> Float64[Tensor, "k k"]:
    """`gram_of` in half the time on a CPU.

    The exact way is taken where `gram_by_blas` takes it, and on other devices.
    """
    on_cpu = all(t.device.type == "cpu" for row in rows for t in row if t is not None)
    if not on_cpu or not full_precision():
        return gram_of(rows, roots)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
    with no_autocast("cpu"):
        for block in blocks_of(rows, roots, block_length(len(rows)), torch.float32):
            total += product_of(block)
    if not in_range(total.diagonal().tolist()):
        return gram_of(rows, roots)
    lower = total.tril(-1)
    return lower + lower.T + total.diagonal().diag()


def matrix_product(rows: Float[Tensor, "k c"]) -> Float64[Tensor, "k k"]:
    """rows @ rows.T, block by block, whose products are added up in float64."""
    device = float64_device(rows.device)
    exact = torch.promote_types(rows.dtype, torch.float32)
    length = block_length(len(rows)) if rows.device.type == "cpu" else DEVICE_CHUNK
    if rows.device.type != "cpu" and has_float64(rows.device):
        exact = torch.float64
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    with no_autocast(rows.device.type):  # it would multiply float32 rows in half precision
        for block in rows.split(length, dim=1):
            total += product_of(block.to(exact)).to(device)
    return total


def block_length(k: int) -> int:
    """Coordinates of k rows that a CPU multiplies at a time."""
    return max(BLOCK // k // PIECE, 1) * PIECE


def product_of(block: Float[Tensor, "k c"]) -> Float[Tensor, "k k"]:
    """block @ block.T; on a CPU in float64, from float32 products of pieces of the block.

    What is left beside whole pieces is multiplied in float64, so that small problems are exact.
    """
    if block.device.type != "cpu":
        return block @ block.T
    whole = block.shape[1] // PIECE * PIECE
    rest = block[:, whole:].double()
    total = rest @ rest.T
    if whole:
        pieces = block[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1)
        total += torch.bmm(pieces, pieces.transpose(1, 2)).sum(0, dtype=torch.float64)
    return total


def no_autocast(*kinds: str) -> ExitStack:
    """Context in which these kinds of devices compute in the precision of their tensors."""
    stack = ExitStack()
    for kind in filter(torch.amp.is_autocast_available, sorted({"cpu", *kinds})):
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def full_precision() -> bool:
    """Whether torch multiplies float32 matrices in float32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for some backends and not for others
        return False


def products_by_blas(
    s: Tensor | None, g: Tensor, chunk: int = ARRIVING_CHUNK
) -> tuple[float, float]:
    """<s, g> and |g|^2 of one parameter on a CPU by dot products.

    No s counts as zeros. Recomputes in float64 if a result leaves float32's range, or if g is zero
    or not finite.
    """
    flat = flatten([g] if s is None else [s, g])
    if g.dtype in HALF or (s is not None and s.dtype in HALF):
        flat = [half_to_float32(v) for v in flat]
    inner, own = dot_products(flat, chunk)
    # s may be smaller still, and the product too small
    small = own < 1e-15 and abs(inner) < 1e-30 and s is not None
    if small or not 1e-30 < own < 1e38 or not abs(inner) < 1e38:
        inner, own = dot_products([v.double() for v in flat], chunk)
    return inner, own


def dot_products(vectors: Vectors, chunk: int) -> tuple[float, float]:
    """Of (s, g): <s, g> and |g|^2; of (g,) alone: 0 and |g|^2."""
    inner = own = 0.0
    for piece in split(vectors, chunk):
        g = piece[-1]
        own += g.dot(g).item()
        if len(piece) == 2:
            inner += piece[0].dot(g).item()
    return inner, own
