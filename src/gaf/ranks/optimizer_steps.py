"""An optimizer's step(): what it moves, which argument is its closure, and an overflow in it."""

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@cache
def names_of_step(kind: Any) -> list[str]:
    """Names of the arguments of an optimizer's step(), self first."""
    return list(signature(kind.step).parameters)


def place_of_closure(kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Which argument of step() evaluates the loss again: `closure`, or else the first callable.

    Returns:
        Its position, or its name if given by name; None without one.
    """
    names = names_of_step(kind)
    if "closure" in kwargs:
        return "closure" if callable(kwargs["closure"]) else None
    if "closure" in names:
        place = names.index("closure")
        return place if place < len(args) and callable(args[place]) else None
    places: list[int | str] = [i for i, v in enumerate(args) if i and callable(v)]
    places += [name for name, value in kwargs.items() if callable(value)]
    return places[0] if places else None


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def fused_overflow(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was called on an overflow, which it leaves alone by itself."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
