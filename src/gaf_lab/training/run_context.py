"""What a run has to itself while it shares a process with others."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class RunContext:
    """A CUDA stream, and the state of torch's random numbers."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.random: Tensor = torch.get_rng_state()

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            with self._on_stream():
                yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
