"""An optimizer's step(): what it moves, where it is given a closure, and whether it saw an overflow."""

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
    """Where step() is given what evaluates the loss again: `closure`, or else the first argument that can be called."""
    names = names_of_step(kind)
    place: int | str | None
    if "closure" in kwargs or "closure" in names:
        place = "closure" if "closure" in kwargs else names.index("closure")
    else:
        places: list[int | str] = [i for i, v in enumerate(args) if i and callable(v)]
        places += [name for name, value in kwargs.items() if callable(value)]
        place = places[0] if places else None
    if isinstance(place, int):
        return place if place < len(args) and callable(args[place]) else None
    return place if place is not None and callable(kwargs[place]) else None


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def fused_overflow(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was called on an overflow, which it leaves alone by itself."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
