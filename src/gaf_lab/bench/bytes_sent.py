"""Bytes that a rank sends: by formula at each collective, and by the kernel at the interface."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

import gaf.ranks.messages


def ring_all_reduce(size: float, k: int) -> float:
    """A reduce-scatter and an all-gather around a ring of k ranks: 2 size (k-1)/k.

    A rank cannot send less on average.
    """
    return 2 * size * (k - 1) / k


def all_to_all(size: float, k: int) -> float:
    """A rank has k slices, `size` bytes in all, and sends k-1 of them."""
    return size * (k - 1) / k


def all_gather(share: float, k: int) -> float:
    """A rank's share reaches k-1 others. Around a ring, the rank passes on as much."""
    return share * (k - 1)


def broadcast(size: float, k: int) -> float:
    """k-1 ranks receive `size` bytes: size (k-1)/k sent per rank on average.

    If every rank broadcasts a slice, the sum is that of all_to_all.
    """
    return size * (k - 1) / k


def volume(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


Count = Callable[..., float]  # bytes for a function's arguments


def counted_functions(k: int) -> Iterator[tuple[Any, str, Count]]:
    """The functions that are counted: the module, the name, and the bytes for its arguments."""
    yield dist, "all_reduce", lambda tensor, *_, **__: ring_all_reduce(volume(tensor), k)
    yield dist, "all_to_all_single", lambda out, tensor, *_, **__: all_to_all(volume(tensor), k)
    yield dist, "isend", lambda tensor, *_, **__: volume(tensor)
    yield dist, "all_gather", lambda out, tensor, *_, **__: all_gather(volume(tensor), k)
    yield dist, "broadcast", lambda tensor, *_, **__: broadcast(volume(tensor), k)
    # DDP's buffers
    yield dist, "_broadcast_coalesced", lambda _, ts, *__, **___: broadcast(volume(*ts), k)
    exchange = gaf.ranks.messages
    yield exchange, "_all_gather", lambda out, tensor, *_, **__: all_gather(volume(tensor), k)


@contextlib.contextmanager
def counting(k: int, group: Any = None) -> Iterator[Counter[str]]:
    """Adds up, by collective, the bytes that this rank sends to the world of k from Python.

    Calls from C++ are not counted, such as DDP's own all-reduce. With a group of k ranks, only what
    is sent in that group counts.
    """
    sent: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for place, name, count in counted_functions(k):
            call = with_count(getattr(place, name), name.lstrip("_"), count, sent, group)
            stack.enter_context(mock.patch.object(place, name, call))
        yield sent


def with_count(
    function: Callable[..., Any], name: str, count: Count, sent: Counter[str], group: Any
) -> Callable[..., Any]:
    """The function, which adds to the counter at each call, or only at those with the group."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if group is not None and kwargs.get("group") != group:
            return function(*args, **kwargs)
        sent[name] += count(*args, **kwargs)  # type: ignore[assignment]
        return function(*args, **kwargs)

    return call


def interface_bytes() -> float | None:
    """Bytes sent so far through gloo's interface, per rank of this machine; None if not on Linux.

    They include headers, and the bytes of other programs.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    counter = Path(f"/sys/class/net/{name}/statistics/tx_bytes")
    if not counter.is_file():
        return None
    return int(counter.read_text()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
