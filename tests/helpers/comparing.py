"""Equality of nested values."""

from typing import Any

from torch import Tensor, equal


def same(a: Any, b: Any) -> bool:
    """Bitwise, through nested containers; NaN equals NaN, and types and dtypes count."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))
