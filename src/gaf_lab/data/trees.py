"""Tensors in tuples, lists and dicts: the inputs and outputs of a task's model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with every tensor changed; what is no tensor stays."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: map_tensors(change, value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [map_tensors(change, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


def rows_of(tree: Any, index: Tensor) -> Any:
    """The rows `index` of every tensor."""
    return map_tensors(lambda tensor: tensor[index.to(tensor.device)], tree)


def move_to(tree: Any, device: torch.device) -> Any:
    return map_tensors(lambda tensor: tensor.to(device), tree)


def widen(tree: Any) -> Any:
    """float16 and bfloat16 as float32: they have too few digits for a loss."""
    short = torch.float16, torch.bfloat16
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype in short else tensor, tree)
