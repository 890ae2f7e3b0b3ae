"""Bytes that a rank sends: by formula at each collective, and as the kernel counts them at the interface."""

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
    """A reduce-scatter and an all-gather around a ring of k ranks: 2 size (k-1)/k, the least that a rank can send on average."""
    return 2 * size * (k - 1) / k


def all_to_all(size: float, k: int) -> float:
    """Of a rank's k slices, size bytes in all, k-1 go elsewhere."""
    return size * (k - 1) / k


def all_gather(share: float, k: int) -> float:
    """A rank's own share reaches k-1 others; around a ring it hands as much on."""
    return share * (k - 1)


def broadcast(size: float, k: int) -> float:
    """k-1 ranks receive `size`, whoever sends it: size (k-1)/k for each of the k on average. From every root a slice: all_to_all."""
    return size * (k - 1) / k


def volume(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def counting_versions(
    sent: Counter[str], k: int
) -> Iterator[tuple[Any, str, Callable[..., float]]]:
    """What is counted: where the function is found, its name, and the bytes for its arguments."""
    yield dist, "all_reduce", lambda tensor, *a, **kw: ring_all_reduce(volume(tensor), k)
    yield dist, "all_to_all_single", lambda output, input, *a, **kw: all_to_all(volume(input), k)
    yield dist, "isend", lambda tensor, *a, **kw: volume(tensor)
    yield dist, "all_gather", lambda outputs, tensor, *a, **kw: all_gather(volume(tensor), k)
    yield dist, "broadcast", lambda tensor, *a, **kw: broadcast(volume(tensor), k)
    # DDP's buffers
    yield (
        dist,
        "_broadcast_coalesced",
        lambda group, tensors, *a, **kw: broadcast(volume(*tensors), k),
    )
    yield (
        gaf.ranks.messages,
        "_all_gather",
        lambda whole, tensor, *a, **kw: all_gather(volume(tensor), k),
    )


@contextlib.contextmanager
def counting(k: int) -> Iterator[Counter[str]]:
    """Adds up, by collective, what this rank sends to the world of k from Python. C++ (DDP's own all-reduce) is not seen."""
    sent: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for place, name, size in counting_versions(sent, k):
            stack.enter_context(
                mock.patch.object(
                    place, name, counted(getattr(place, name), name.lstrip("_"), size, sent)
                )
            )
        yield sent


def counted(
    function: Callable[..., Any], name: str, size: Callable[..., float], sent: Counter[str]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        sent[name] += size(*args, **kwargs)  # type: ignore[assignment]
        return function(*args, **kwargs)

    return call


def interface_bytes() -> float | None:
    """Bytes sent so far through gloo's interface, headers and other programs' included, per rank of this machine; Linux only."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    count = Path(f"/sys/class/net/{name}/statistics/tx_bytes")
    return (
        int(count.read_text()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if count.is_file()
        else None
    )
