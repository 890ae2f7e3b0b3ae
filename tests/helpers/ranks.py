"""Worlds of processes that stay: starting one costs seconds, a task in it milliseconds."""

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.warm import WARM

# Seconds. Both only guard against a hang, so that a busy machine fails no test.
GROUP_LIMIT = 600.0  # of a collective
ANSWER_LIMIT = 900.0  # of a task; above the former, so that a collective's own error is seen


def serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=GROUP_LIMIT),
    )
    while True:
        task, args = pipe.recv()
        if task is None:
            break
        try:
            torch.manual_seed(0)
            pipe.send((task(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


def answer(pipe: Connection) -> tuple[Any, str | None]:
    """What a task returned, or the error."""
    try:
        if pipe.poll(ANSWER_LIMIT):
            return pipe.recv()
        return None, f"no answer within {ANSWER_LIMIT:.0f} s"
    except EOFError:
        return None, "the process is gone"


class Ranks:
    """W gloo processes; `run` gives a task to each and returns what each returned."""

    def __init__(self, world: int, imports: Iterable[str] = ()) -> None:
        self.world, self.folder = world, tempfile.TemporaryDirectory()
        self.broken = False  # whether a task failed: its processes may wait for each other
        store = str(Path(self.folder.name) / "store")
        self.processes = [
            WARM.start(serve, rank, world, store, imports=imports) for rank in range(world)
        ]
        self.pipes = [process.pipe for process in self.processes]

    def start(self, task: Callable[..., Any], *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((task, args))

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        self.start(task, *args)
        results = [answer(pipe) for pipe in self.pipes]
        errors = [f"rank {r}: {error}" for r, (_, error) in enumerate(results) if error is not None]
        if errors:
            self.broken = True
            raise AssertionError("\n".join(errors))
        return [result for result, _ in results]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if self.broken:
                process.kill()
            else:
                pipe.send((None, ()))
        for process in self.processes:
            process.wait()
        self.folder.cleanup()


World = Callable[[int], Ranks]  # the fixture `world`: W -> the processes
