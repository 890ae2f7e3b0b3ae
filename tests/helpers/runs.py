"""Runs that are compared to the last bit, and one that is stopped on the way."""

import torch

from gaf_lab.records import checkpoint
from helpers.fakes import Silent


class Stop(Silent):
    """Ctrl-C after some steps."""

    def __init__(self, after):
        self.after = after

    def stepped(self, step, outcome):
        if step == self.after:
            raise KeyboardInterrupt


def final_state(folder):
    state = torch.load(folder / checkpoint.CHECKPOINT_FILE, weights_only=True)
    state.pop("seconds")
    state.pop("records_size")
    return state


def assert_same(a, b, where=""):
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
