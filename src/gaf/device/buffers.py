"""A gradient as a list of one tensor per parameter: which vote, whose memory it is, and sums."""

from collections.abc import Sequence
from sys import getrefcount

import torch
from torch import Tensor

from gaf.rules.gram import gram_of
from gaf.rules.slices import half_to_float32

Buffers = list[Tensor | None]  # one per parameter


def add_in_place(total: Buffers, row: Buffers) -> None:
    """total + row, in the memory of total. A part that total lacks is taken out of the row."""
    pairs = [(s, g) for s, g in zip(total, row, strict=True) if s is not None and g is not None]
    if pairs:
        torch._foreach_add_([s for s, _ in pairs], [g for _, g in pairs])
    del pairs  # `unshare` counts references
    for j, s in enumerate(total):
        if s is None and row[j] is not None:
            total[j] = half_to_float32(take_out(row, j))


def with_copies(row: Buffers, total: Buffers) -> Buffers:
    """The row, with copies of the parts that `add_in_place` would take out of it."""
    pairs = zip(row, total, strict=True)
    return [g.clone() if s is None and g is not None else g for g, s in pairs]


def unshare_all(row: Buffers) -> None:
    """Makes the row's memory its own."""
    for j in range(len(row)):
        if row[j] is not None:
            row[j] = take_out(row, j)


def take_out(row: Buffers, j: int) -> Tensor:
    """Part j of the row, which lacks it then, in memory of its own."""
    grad, row[j] = row[j], None
    assert grad is not None
    return unshare(grad)


def voting_part(row: Sequence[Tensor | None], voters: Sequence[bool]) -> Buffers:
    return [t for t, votes in zip(row, voters, strict=True) if votes]


def is_missing(row: Sequence[Tensor | None]) -> bool:
    """Whether there is a gradient for no parameter."""
    return all(t is None for t in row)


def where_any(had_gradient: Sequence[Sequence[bool]], update: Buffers) -> Buffers:
    """The update, without the parameters that none of these rows has a gradient for."""
    columns = zip(*had_gradient, strict=True)
    return [g if any(column) else None for g, column in zip(update, columns, strict=True)]


def where_rooted(
    voters: Sequence[bool], roots: Buffers | None
) -> tuple[Sequence[bool], Buffers | None]:
    """Which parameters take part where some have a root of the metric, and these roots."""
    if roots is None or all(root is None for root in roots):
        return voters, None
    return [root is not None for root in roots], roots


def norm2_of_rest(row: Sequence[Tensor | None], voters: Sequence[bool]) -> Tensor | float:
    """0 x |the coordinates that do not vote|^2.

    NaN where one of them is not finite: the row then counts as absent.
    """
    rest = [t for t, votes in zip(row, voters, strict=True) if not votes]
    if is_missing(rest):
        return 0.0
    return 0.0 * gram_of([rest])[0, 0]


def unshare(grad: Tensor) -> Tensor:
    """The gradient, or a copy where its memory is shared: the result may be written over.

    Autograd can hand out a gradient whose memory another tensor uses too, and a hook can keep it.
    """
    kept = getrefcount(grad) > ALONE
    shared = torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > 2
    return grad.clone() if kept or shared else grad


def references(grad: Tensor) -> int:
    return getrefcount(grad)


def references_to_one_alone() -> int:
    """What `unshare` counts for a tensor that only its caller holds.

    The number depends on the version of Python.
    """
    grad = torch.empty(0, device="cpu")
    return references(grad)


ALONE = references_to_one_alone()
