"""Several runs on one device in one process: one small network does not fill a GPU, several side by side do.

Runs take turns on the host, in one thread. A run's turn ends when it has launched steps (`engine.py`), on a CUDA stream of its
own; while the device works on them, the others process what theirs have brought, evaluate, and launch. Every run is bit for bit what
it would be alone, as far as the device adds in a fixed order.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gaf_lab.records import run as records
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.run import Listener, Turns, train_in_turns

T = TypeVar("T")


def train_together(
    configs: Sequence[TrainConfig],
    folders: Sequence[Path],
    listeners: Sequence[Listener],
    **options: Any,
) -> list[records.Run | Exception]:
    """Runs each config in its folder, all of them at the same time.

    Args:
        configs: the runs. One whose engine is plain goes through in a single turn.
        folders: one for each.
        listeners: one for each.
        options: `data_folder`, `steps`, `resume`, `keep_checkpoints` and `command`, as for `gaf_lab.training.run.train`.

    Returns:
        Of every run its records, or the exception that ended it: one that diverges or cannot start does not disturb the others.

    Raises:
        KeyboardInterrupt: when all runs have closed their records; with `resume` they go on.
    """
    each = zip(configs, folders, listeners, strict=True)
    return in_turns(
        [train_in_turns(config, folder, listener, **options) for config, folder, listener in each]
    )


def in_turns(runs: Sequence[Turns[T]]) -> list[T | Exception]:
    """Goes round from run to run until all have ended. Gives what came of each, or the exception that ended it."""
    ended: dict[int, T | Exception] = {}
    places = [Place() for _ in runs]
    try:
        while len(ended) < len(runs):
            for i, run in enumerate(runs):
                if i not in ended:
                    with places[i].taken():
                        try:
                            next(run)
                        except StopIteration as end:
                            ended[i] = end.value
                        except Exception as error:
                            ended[i] = error
    finally:
        for run in runs:
            run.close()
    return [ended[i] for i in range(len(runs))]


class Place:
    """What a run has to itself while it shares a process: a CUDA stream, and torch's random numbers."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.random: Tensor = torch.get_rng_state()

    @contextlib.contextmanager
    def taken(self) -> Any:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random)
        on_stream: AbstractContextManager[Any] = (
            contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        )
        try:
            with on_stream:
                yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(outside)
