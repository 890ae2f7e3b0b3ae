"""A gradient as a list of one tensor per parameter: which vote, and sums of such lists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.rules.gram import gram_of
from gaf.rules.slices import half_to_float32

Buffers = list[Tensor | None]  # one per parameter


def have_same_layout(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def add_in_place(total: Buffers, row: Buffers) -> Buffers:
    """total + row, in the memory of total; a part that total lacks becomes the row's."""
    pairs = [(s, g) for s, g in zip(total, row, strict=True) if s is not None and g is not None]
    if pairs:
        torch._foreach_add_([s for s, _ in pairs], [g for _, g in pairs])
    both = zip(total, row, strict=True)
    return [half_to_float32(g) if s is None and g is not None else s for s, g in both]


def voting_part(row: Sequence[Tensor | None], voters: Sequence[bool]) -> Buffers:
    return [t for t, votes in zip(row, voters, strict=True) if votes]


def norm2_of_rest(row: Sequence[Tensor | None], voters: Sequence[bool]) -> Tensor | float:
    """0 x |the coordinates that do not vote|^2.

    NaN where one of them is not finite: the row then counts as absent.
    """
    rest = [t for t, votes in zip(row, voters, strict=True) if not votes]
    if all(t is None for t in rest):
        return 0.0
    return 0.0 * gram_of([rest])[0, 0]
