"""Cuts rows into slices: the same coordinates of every row, few enough at a time to stay in cache.

A row is a tensor, or a list with a tensor for each parameter. Every slice is k vectors (c,) whose
coordinates stand in the same order. Long tensors are split, and short ones joined to save calls.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

SLICE = 2**15  # coordinates in a slice on a CPU
CHUNK = 2**14  # in a partial sum of float32 products: few enough for its digits
DEVICE_CHUNK = 2**22  # an accelerator does few large products faster than many small ones
SHORT = 2**12  # vectors below this are joined first
DEVICE_SHORT = 2**20

HALF = (torch.float16, torch.bfloat16)

Row = Sequence[Tensor | None]  # one micro-gradient, a tensor per parameter; None counts as zeros
Vectors = Sequence[Tensor]  # the same coordinates of all k rows, each (c,)


def slices_of(rows: Sequence[Row], length: int = SLICE) -> Iterator[Vectors]:
    """The rows slice by slice; long vectors as they lie in memory, short ones joined.

    length: of a slice on a CPU.
    """
    waiting: list[Vectors] = []
    for piece in pieces_of(rows, length):
        if piece[0].numel() >= short_on(piece[0].device):
            yield piece
            continue
        if waiting and not fits(piece, waiting):
            yield join(waiting)
            waiting = []
        waiting.append(piece)
    if waiting:
        yield join(waiting)


def fits(piece: Vectors, waiting: list[Vectors]) -> bool:
    """Whether a short piece may be joined to those that wait: same device, still short."""
    device = piece[0].device
    total = sum(vectors[0].numel() for vectors in waiting)
    return waiting[0][0].device == device and total < short_on(device)


def join(pieces: list[Vectors]) -> Vectors:
    return [torch.cat(vectors) for vectors in zip(*pieces, strict=True)]


def pieces_of(rows: Sequence[Row], length: int) -> Iterator[Vectors]:
    """The rows parameter by parameter, in pieces of at most a slice."""
    for column in zip(*rows, strict=True):
        some = next((t for t in column if t is not None), None)
        if some is not None and some.numel():
            vectors = flatten([torch.zeros_like(some) if t is None else t for t in column])
            yield from split(vectors, slice_on(some.device, length))


def slice_on(device: torch.device, length: int) -> int:
    return length if float64_device(device).type == "cpu" else DEVICE_CHUNK


def short_on(device: torch.device) -> int:
    """An accelerator needs as long for the call as for some hundred thousand coordinates."""
    return SHORT if float64_device(device).type == "cpu" else DEVICE_SHORT


def chunk_on(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK


def split(vectors: Vectors, chunk: int) -> Iterable[Vectors]:
    """The vectors, cut alike into pieces of at most `chunk` coordinates."""
    if vectors[0].numel() <= chunk:
        return (vectors,)
    return zip(*(v.split(chunk) for v in vectors), strict=True)


def flatten(tensors: list[Tensor]) -> Vectors:
    """Vectors of the same coordinates in the same order; views of tensors that lie alike."""
    if all(map(Tensor.is_contiguous, tensors)):
        return [t.view(-1) for t in tensors]
    first = tensors[0]
    if all(t.stride() == first.stride() for t in tensors):
        # channels_last becomes contiguous
        order = sorted(range(first.ndim), key=first.stride, reverse=True)
        tensors = [t.permute(order) for t in tensors]
    return [t.reshape(-1) for t in tensors]


def fill(block: Tensor, vectors: Vectors) -> Tensor:
    """Copies the vectors into the rows of the block; `stack` is slow where it converts."""
    if all(v.dtype == block.dtype for v in vectors):
        return torch.stack(list(vectors), out=block)
    for row, v in zip(block, vectors, strict=True):
        row.copy_(v)
    return block


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, set(dtypes))


def float64_device(device: torch.device) -> torch.device:
    """The device, or the CPU for one that has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def half_to_float32(tensor: Tensor) -> Tensor:
    """Half precision is added up in float32.

    Sums of float16 leave its range even if their mean does not, and bfloat16's lose rows.
    """
    return tensor.float() if tensor.dtype in HALF else tensor
