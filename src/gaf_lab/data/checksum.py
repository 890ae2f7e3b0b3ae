"""A checksum of a task's training data, so that a run is not resumed on others."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from gaf_lab.data.problem import Part, count_samples
from gaf_lab.data.trees import tensors_in

MOST_BYTES = 2**28  # of a tensor: of a larger one, rows at even distances are taken
HASHED_ITEMS = 16  # of a Dataset, at even distances


def hash_data(train: Part) -> str:
    """Twelve hex digits that differ if the data differ.

    Of a Dataset, the length and HASHED_ITEMS of its samples count, and its attribute `targets`.
    """
    digest = hashlib.blake2b(digest_size=6)
    if isinstance(train, tuple):
        add(digest, train)
        return digest.hexdigest()
    n = count_samples(train)
    digest.update(f"{n} samples".encode())
    targets = getattr(train, "targets", None)
    if targets is not None:
        add(digest, torch.as_tensor(targets))
    for place in places(n, HASHED_ITEMS):
        add(digest, train[place])
    return digest.hexdigest()


def add(digest: Any, tree: Any) -> None:
    """Tensors by their bytes, shape and type; anything else, such as numbers, as text."""
    found = tensors_in(tree)
    if not found:
        digest.update(repr(tree).encode())
    for tensor in found:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(content(tensor))


def content(tensor: Tensor) -> bytes:
    if tensor.numel() * tensor.element_size() > MOST_BYTES:
        rows = MOST_BYTES * len(tensor) // (tensor.numel() * tensor.element_size())
        tensor = tensor[places(len(tensor), max(1, rows))]
    whole = tensor.detach().cpu().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def places(n: int, count: int) -> list[int]:
    """At most `count` of n places, at even distances, the first and the last among them."""
    return sorted({round(i * (n - 1) / max(1, count - 1)) for i in range(min(n, count))})
