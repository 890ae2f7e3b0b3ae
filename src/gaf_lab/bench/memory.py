"""Peaks of memory: of tensors, from the allocator's own events, and of a process, from /proc."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gaf_lab.bench.timing import StepFunction


def tensor_peak(make: Callable[[], StepFunction]) -> int:
    """The most bytes that tensors hold at once while a model is made and takes two steps."""
    with (
        silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        step = make()
        step()
        step()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discards stderr: the profiler's library writes a line each time that it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def process_bytes(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most so far; 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def give_back_freed_memory() -> None:
    """Makes glibc return every large block at once.

    By default it keeps some, depending on their history, and peaks differ from run to run.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, its default, but fixed
