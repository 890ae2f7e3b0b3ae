"""K of the per-sample gradients of one parameter, by the cheaper of two ways.

Where a gradient is a sum of outer products over T positions, these are

    ghost           K_ij = sum over t, s of <left_it, left_js> <right_it, right_js>
    materialised    the gradients themselves, some rows of the parameter at a time

The shapes decide: the way with fewer multiplications is taken.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from gaf.rules.blas import matrix_product
from gaf.samples.pieces import Piece, ranges
from gaf.shapes import Float64


def gram_of_pieces(pieces: Sequence[Piece]) -> Float64[Tensor, "n n"]:
    """The Gram matrix of the per-sample gradients of one parameter, the sums of its pieces."""
    whole = join_pieces(pieces)
    by_ghost, by_rows = whole[0].costs
    if len(whole) == 1 and by_ghost < by_rows:
        return whole[0].ghost()
    n, height, width = whole[0].n, whole[0].height, whole[0].width
    total = None
    for low, high in ranges(height, n * width):
        part = matrix_product(reduce(torch.add, [piece.rows(low, high) for piece in whole]))
        total = part if total is None else total + part
    assert total is not None
    return total


def join_pieces(pieces: Sequence[Any]) -> Sequence[Piece]:
    """One piece, where all are of one kind."""
    kinds = {(type(p), p.height, p.width, p.groups) for p in pieces}
    return [reduce(type(pieces[0]).join, pieces)] if len(kinds) == 1 else pieces
