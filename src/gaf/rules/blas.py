"""The Gram matrix by BLAS: fast and less exact, for rows that a step has to look at in passing.

Errors stay below 1e-6 on ordinary gradients and reach 2e-4 if few coordinates hold nearly all of
the norm. The table in `gaf.rules.gram` shows who uses it.
"""

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from gaf.rules.gram import gram_of
from gaf.rules.slices import (
    Vectors,
    chunk_on,
    flatten,
    float64_device,
    half_to_float32,
    has_float64,
    split,
)
from gaf.shapes import Float, Float64

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


def matrix_product(rows: Float[Tensor, "k c"]) -> Float64[Tensor, "k k"]:
    """rows @ rows.T, slice by slice, whose products are added up in float64."""
    device = float64_device(rows.device)
    exact = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type != "cpu" and has_float64(rows.device):
        exact = torch.float64
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    with no_autocast(rows.device.type):  # it would multiply float32 rows in half precision
        for chunk in rows.split(chunk_on(rows.device), dim=1):
            block = chunk.to(exact)
            total += (block @ block.T).to(device)
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
    flat = [half_to_float32(v) for v in flatten([g] if s is None else [s, g])]
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
        inner += piece[0].dot(piece[1]).item() if len(piece) == 2 else 0.0
        own += piece[-1].dot(piece[-1]).item()
    return inner, own
