"""Runs models as if they had not run: what they hold, and all random state, is put back."""

import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # of a tensor
CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextmanager
def keep_untouched(*owners: Any) -> Iterator[None]:
    """Puts back what the modules among the owners hold, and all global random state.

    It does so after an exception too. Of a module: attributes, and so modes, hooks, parameters and
    buffers, also those that were None; the values of all its tensors, bit for bit in their own
    memory; `requires_grad`; `p.grad`, which is None in between. What dictionaries, lists and sets
    of a module hold is put back, however deep; other objects are left alone.

    Of randomness: torch's on the CPU and on CUDA devices, Python's `random`, and numpy's if it is
    loaded.

    Gradients are recorded inside, and autocast keeps no copies of weights.
    """
    modules, containers, tensors = parts_of(owners)
    with ExitStack() as stack:
        stack.callback(keep_random_state())
        stack.callback(keep_modes(modules))
        # after the values: a gradient must fit its tensor
        stack.callback(keep_leaves([t for t in tensors if t.is_leaf]))
        stack.callback(keep_values(tensors))
        stack.callback(keep_contents(containers))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


Undo = Callable[[], object]


def parts_of(owners: Iterable[Any]) -> tuple[list[nn.Module], list[Any], list[Tensor]]:
    """The modules among the owners and within them, their containers and tensors, each once."""
    modules, containers, tensors = {}, {}, {}
    waiting = [getattr(one, "__self__", one) for one in owners]  # a method's module
    waiting = [one for one in waiting if isinstance(one, nn.Module)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            tensors[id(one)] = one
            waiting += [getattr(one, name) for name in HOOKS]
        elif isinstance(one, nn.Module) and id(one) not in modules:
            modules[id(one)] = one
            waiting += [vars(one), *one.parameters(False), *one.buffers(False), *one.children()]
        elif type(one) in CONTAINERS and id(one) not in containers:
            containers[id(one)] = one
            waiting += one.values() if isinstance(one, dict) else one
        elif isinstance(one, tuple):
            waiting += one
    return list(modules.values()), list(containers.values()), list(tensors.values())


def keep_random_state() -> Undo:
    undo: list[Undo] = [partial(torch.set_rng_state, torch.get_rng_state())]
    undo.append(partial(random.setstate, random.getstate()))
    if torch.cuda.is_initialized():
        undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        undo.append(partial(numpy.set_state, numpy.get_state()))
    return lambda: [one() for one in undo]


def keep_modes(modules: Iterable[nn.Module]) -> Undo:
    """train or eval. Also for scripted modules, whose attributes are not Python's."""
    modes = [(module, module.training) for module in modules]

    def undo() -> None:
        for module, training in modes:
            if module.training != training:
                module.training = training

    return undo


def keep_contents(containers: Iterable[Any]) -> Undo:
    """What dictionaries, lists, sets and deques hold."""
    kept = [(one, items_of(one)) for one in containers]

    def undo() -> None:
        for one, items in kept:
            if not same_items(one, items):
                one.clear()
                (one.extend if isinstance(one, list | deque) else one.update)(items)

    return undo


def items_of(container: Any) -> list[Any]:
    """The items of a list or set, the (key, value) pairs of a dictionary."""
    return list(container.items() if isinstance(container, dict) else container)


def same_items(container: Any, items: list[Any]) -> bool:
    """Whether a container holds the very same objects in the same order."""
    now, was = items_of(container), items
    if len(now) != len(was):
        return False
    if isinstance(container, dict):
        now, was = list(chain.from_iterable(now)), list(chain.from_iterable(was))
    return all(a is b for a, b in zip(now, was, strict=True))


def keep_values(tensors: Iterable[Tensor]) -> Undo:
    """Values in their memory, and which memory each tensor shows.

    Views, tied and expanded tensors need no care this way.
    """
    shown = [(t, t.data) for t in tensors if has_memory(t)]
    memory = {t.untyped_storage()._cdata: t.untyped_storage() for t, _ in shown}
    kept = [(storage, content(storage).clone()) for storage in memory.values()]

    def undo() -> None:
        for storage, was in kept:
            if storage.nbytes() != was.numel():
                storage.resize_(was.numel())
            if not torch.equal(content(storage), was):
                content(storage).copy_(was)
        for t, alias in shown:
            if not same_place(t, alias):
                t.data = alias

    return undo


def has_memory(t: Tensor) -> bool:
    """Whether a tensor's values lie in one piece of memory.

    Those of sparse tensors, and of tensor classes made of other tensors, do not.
    """
    strided = t.layout == torch.strided and t.device.type != "meta"
    return strided and not is_lazy(t) and not is_traceable_wrapper_subclass(t)


def content(storage: torch.UntypedStorage) -> Tensor:
    """All bytes, (m,) uint8, as a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def same_place(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    )


def keep_leaves(leaves: Iterable[Tensor]) -> Undo:
    """Gradients, requires_grad, and whether there are hooks.

    A gradient is taken away meanwhile, so that no other is added to it.
    """
    kept = [(t, t.requires_grad, t.grad, [getattr(t, name) for name in HOOKS]) for t in leaves]
    for t, _, grad, _ in kept:
        if grad is not None:
            t.grad = None

    def undo() -> None:
        for t, trained, grad, hooks in kept:
            if t.requires_grad != trained:
                t.requires_grad_(trained)
            if t.grad is not grad:
                t.grad = grad
            for name, those in zip(HOOKS, hooks, strict=True):
                if getattr(t, name) is not those:
                    setattr(t, name, those)

    return undo
