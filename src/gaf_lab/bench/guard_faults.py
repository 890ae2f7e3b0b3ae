"""What goes wrong at one worker in `gaf bench guard`, from a step on and for ever."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

CLEAN, LABELS, STALE = "none", "random labels", "stale weights"


def set_first(value: float) -> Callable[[Tensor, Generator], None]:
    """One coordinate becomes the value."""

    def put(row: Tensor, rng: Generator) -> None:
        row[0] = value

    return put


def multiply(factor: float) -> Callable[[Tensor, Generator], None]:
    def scale(row: Tensor, rng: Generator) -> None:
        row *= factor

    return scale


def flip_bit(lowest: int, highest: int) -> Callable[[Tensor, Generator], None]:
    """One bit of one coordinate at each step, drawn anew; bits are counted from the lowest."""

    def flip(row: Tensor, rng: Generator) -> None:
        place = int(torch.randint(len(row), (), generator=rng))
        bit = int(torch.randint(lowest, highest + 1, (), generator=rng))
        row.view(torch.int32)[place] ^= 1 << bit

    return flip


# what happens to the worker's gradient, a float32 vector, in place
ROW_FAULTS: dict[str, Callable[[Tensor, Generator], None]] = {
    "NaN": set_first(math.nan),
    "infinite": set_first(math.inf),
    "1000 times": multiply(1000),
    "sign flipped": multiply(-1),
    "exponent bit": flip_bit(23, 30),
    "mantissa bit": flip_bit(0, 22),
}
FAULTS = (CLEAN, *ROW_FAULTS, LABELS, STALE)
