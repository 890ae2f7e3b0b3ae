"""Buffers that a cast of the whole model leaves as precise as they are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FloatBuffers(nn.Module):
    """A module whose buffers move with `to`, `half`, `bfloat16` and the like, but keep their type.

    Counts and labels above 256 have no place in bfloat16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep, recurse)
