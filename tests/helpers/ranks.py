"""Worlds of processes that stay: starting one costs seconds, a task in it milliseconds."""

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jaxtyping
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds. Both only guard against a hang, so that a busy machine fails no test.
GROUP_LIMIT = 600.0  # of a collective
ANSWER_LIMIT = 900.0  # of a task; above the former, so that a collective's own error is seen


def serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    # as in the tests' own process, before gaf is imported
    jaxtyping.install_import_hook("gaf", "typechecker.check")
    torch.set_num_threads(1)
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

    def __init__(self, world: int) -> None:
        self.world, self.folder = world, tempfile.TemporaryDirectory()
        self.broken = False  # whether a task failed: its processes may wait for each other
        store = str(Path(self.folder.name) / "store")
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, store, there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()  # else the end of the process would not end the pipe
            self.pipes.append(here)
            self.processes.append(process)

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
            process.join(GROUP_LIMIT)
        self.folder.cleanup()


World = Callable[[int], Ranks]  # the fixture `world`: W -> the processes
