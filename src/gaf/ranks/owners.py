"""Records which handle decides on a parameter; refuses steps by other optimizers."""

import gc
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from gaf.ranks.handle import Handle
from gaf.ranks.optimizer_steps import parameters_of

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (its model, its handle), weakly
_handles: WeakSet[Handle] = WeakSet()


def claim(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Takes parameters over from handles whose model is gone.

    Raises:
        RuntimeError: if another handle decides on one of them.
    """
    for p in params:
        wrapper, handle = owner_of(p)
        if handle is None or not handle.attached:
            continue
        if is_alive(wrapper):
            raise RuntimeError(
                "attach: the model's parameters must not be attached already; they are, by an "
                "earlier gaf.attach. Call detach() on the handle that it returned, or delete the "
                "wrapper that it was called with."
            )
        handle.detach()


def owner_of(p: Tensor) -> tuple[Callable[[], Any], Handle | None]:
    """What gives the model of a parameter, or None once it is gone; and the handle."""
    wrapper, handle = _owners.get(p, (nothing, nothing))
    return wrapper, handle()


def nothing() -> None:
    return None


def record_owner(model: nn.Module, params: Sequence[Tensor], handle: Handle) -> None:
    for p in params:
        _owners[p] = (ref(model), ref(handle))
    watch_optimizers()
    _handles.add(handle)


@cache
def watch_optimizers() -> None:
    register_optimizer_step_pre_hook(refuse_stranger)


def refuse_stranger(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before every step of any optimizer: one that attach was not given would step past a skip."""
    for handle in list(_handles):
        if not handle.attached or handle.steps.watches(optimizer) or handle.steps.stepping:
            continue  # a step within one of the handle's own optimizers belongs to that one
        p = next((p for p in parameters_of(optimizer) if p in handle.stale.params), None)
        if p is not None and not is_alive(owner_of(p)[0]):
            handle.detach()
        elif p is not None:
            raise RuntimeError(
                "attach: every optimizer that steps on the model's parameters must be given to "
                f"attach; a {type(optimizer).__name__} that was not is about to. "
                "Give attach the optimizer whose step() the loop calls, or all of them as a list; "
                "after making a new one, call handle.detach() and attach again."
            )


def is_alive(wrapper: Callable[[], Any]) -> bool:
    """Whether a model still exists once cycles are collected: DDP and its hooks form cycles."""
    if wrapper() is not None:
        gc.collect()
    return wrapper() is not None
