"""Runs that are compared to the last bit, one that is stopped on the way, and waiting for one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gaf_lab.records import checkpoint
from helpers.fakes import Silent


class Stop(Silent):
    """Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, step: int, outcome: Any) -> None:
        if step == self.after:
            raise KeyboardInterrupt


def final_state(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run, without what depends on the time that it took."""
    state = torch.load(folder / checkpoint.CHECKPOINT_FILE, weights_only=True)
    state.pop("seconds")
    state.pop("records_size")
    return state


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, through nested states."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or a != a, where


def wait_until(holds: Callable[[], bool], seconds: float = 900.0) -> None:
    """Waits, so long that a busy machine does not matter."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.01)
