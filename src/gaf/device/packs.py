"""Packs a row: few long vectors in place of a tensor for each parameter.

A small tensor costs a call and hardly any work, and a network has hundreds of them. Rows are
multiplied, added up and weighted as vectors; only the update has a tensor for each parameter again.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gaf.device.buffers import Buffers
from gaf.rules.slices import DEVICE_CHUNK, DEVICE_SHORT, float64_device

CPU_SHORT = 2**16 + 1  # a CPU copies less than that in the time that a vector costs in calls


class Apart:
    """A tensor for each parameter, as the gradients come.

    Args:
        voters: which parameters take part in the decision.

    Attributes:
        votes: which vectors take part in the decision.
        device: of products of the rows.
    """

    def __init__(self, voters: Sequence[bool]) -> None:
        self.votes, self.device = list(voters), torch.device("cpu")

    def pack(self, row: Buffers) -> Buffers:
        """The row's vectors."""
        return row

    def unpack(self, vectors: Buffers) -> Buffers:
        """Tensors in the shapes of the parameters."""
        return vectors


class Kind(NamedTuple):
    """What of a parameter decides with which others it is packed, and how."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    votes: bool


def packs_for(params: Sequence[Tensor], voters: Sequence[bool]) -> "Packs":
    """The same object for the same parameters, since making it takes long.

    Args:
        params: that the rows are gradients of.
        voters: which of them take part in the decision.
    """
    pairs = zip(params, voters, strict=True)
    return make_packs(tuple(Kind(p.shape, p.stride(), p.dtype, p.device, v) for p, v in pairs))


@lru_cache(maxsize=32)
def make_packs(kinds: tuple[Kind, ...]) -> "Packs":
    return Packs(kinds)


class Packs:
    """One vector for short parameters together; long ones stay as they are.

    Attributes:
        members: of each vector, the parameters whose coordinates it holds.
        votes: which vectors take part in the decision.
        device: of products of the rows.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.device = float64_device(kinds[0].device)
        self.layouts = [Layout(kind) for kind in kinds]
        self.members = groups_of(kinds)
        self.votes = [kinds[group[0]].votes for group in self.members]

    def pack(self, row: Buffers) -> Buffers:
        """The row's vectors; the row is used up. Short gradients that are missing are zeros."""
        return [self._vector(group, row) for group in self.members]

    def _vector(self, group: list[int], row: Buffers) -> Tensor | None:
        parts = [row[j] for j in group]
        for j in group:
            row[j] = None
        if len(parts) == 1 or all(part is None for part in parts):
            return parts[0]
        pairs = zip(group, parts, strict=True)
        return torch.cat([self.layouts[j].flatten_or_zeros(part) for j, part in pairs])

    def unpack(self, vectors: Buffers) -> Buffers:
        """Tensors in the shapes and memory orders of the parameters: views of the vectors."""
        row: Buffers = [None] * len(self.layouts)
        for group, vector in zip(self.members, vectors, strict=True):
            if len(group) == 1:
                row[group[0]] = vector
            elif vector is not None:
                parts = vector.split([self.layouts[j].numel for j in group])
                for j, part in zip(group, parts, strict=True):
                    row[j] = self.layouts[j].shape_of(part)
        return row


class Layout:
    """One parameter's shape and the order in which its coordinates lie in memory."""

    def __init__(self, kind: Kind) -> None:
        shape, strides = kind.shape, kind.strides
        self.numel, self.dtype, self.device = shape.numel(), kind.dtype, kind.device
        like = torch.empty_strided(shape, strides, device="meta")
        if not torch.ops.aten.is_non_overlapping_and_dense(like):
            strides = torch.empty(shape, device="meta").stride()
        dims = range(len(shape))
        self.order = sorted(dims, key=strides.__getitem__, reverse=True)
        self.shape = [shape[i] for i in self.order]
        self.in_order = self.order == list(dims)
        self.back = sorted(dims, key=self.order.__getitem__)

    def flatten_or_zeros(self, grad: Tensor | None) -> Tensor:
        """A view of a gradient that lies as the parameter does; a copy of another one."""
        if grad is None:
            return torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        return grad.reshape(-1) if self.in_order else grad.permute(self.order).reshape(-1)

    def shape_of(self, vector: Tensor) -> Tensor:
        """A view in the shape and the memory order of the parameter."""
        shaped = vector.view(self.shape)
        return shaped if self.in_order else shaped.permute(self.back)


def groups_of(kinds: Sequence[Kind]) -> list[list[int]]:
    """The parameters' indices by vector: alike in device, dtype and vote."""
    groups: list[list[int]] = []
    last: dict[tuple[object, ...], tuple[list[int], int]] = {}  # and how long it is
    for j, kind in enumerate(kinds):
        numel, like = kind.shape.numel(), (kind.device, kind.dtype, kind.votes)
        short = numel < packed_below(kind.device)
        group, size = last.get(like, ([], DEVICE_CHUNK))
        if not short or size + numel > DEVICE_CHUNK:
            groups.append(group := [])
            size = 0
        group.append(j)
        if short:
            last[like] = group, size + numel
    return groups


def packed_below(device: torch.device) -> int:
    """The length from which on a parameter is a vector by itself."""
    return CPU_SHORT if float64_device(device).type == "cpu" else DEVICE_SHORT
