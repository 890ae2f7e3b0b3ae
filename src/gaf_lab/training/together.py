"""Several runs on one device in one process.

One small network does not fill a GPU; several side by side do.

Runs take turns on the host, in one thread. A run's turn ends when it has launched steps
(`device_engine.py`) on its own CUDA stream. While the device works on them, the others process
their finished steps, evaluate, and launch. Every run gives bit for bit the same results as alone,
as far as the device adds in a fixed order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_lab.records import run as records
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.listener import Listener
from gaf_lab.training.run import train_in_turns
from gaf_lab.training.run_context import RunContext
from gaf_lab.training.turns import Result, Turns


def train_together(
    configs: Sequence[TrainConfig],
    folders: Sequence[Path],
    listeners: Sequence[Listener],
    **options: Any,
) -> list[records.Run | Exception]:
    """Runs all configs at the same time, each in its folder.

    Args:
        configs: the runs. One whose engine is plain goes through in a single turn.
        folders: one for each.
        listeners: one for each.
        options: `data_folder`, `steps`, `resume`, `keep_checkpoints` and `command`, as for
            `gaf_lab.training.run.train`.

    Returns:
        for each run its records, or the exception that ended it. A run that diverges or cannot
        start does not disturb the others.

    Raises:
        KeyboardInterrupt: after all runs have closed their records; with `resume` they go on.
    """
    each = zip(configs, folders, listeners, strict=True)
    return in_turns(
        [train_in_turns(config, folder, listener, **options) for config, folder, listener in each]
    )


def in_turns(runs: Sequence[Turns[Result]]) -> list[Result | Exception]:
    """Advances one run after the other until all have ended.

    Returns:
        for each its result, or the exception that ended it.
    """
    ended: dict[int, Result | Exception] = {}
    contexts = [RunContext() for _ in runs]
    try:
        while len(ended) < len(runs):
            for i, run in enumerate(runs):
                if i not in ended:
                    with contexts[i].enter():
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
