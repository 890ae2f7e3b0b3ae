"""Processes that stay: starting one costs seconds, a task in it milliseconds."""

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

TIMEOUT = 60.0  # seconds


def serve(rank: int, world: int, store: str, pipe: Connection, timeout: float) -> None:
    # as in the tests' own process, before gaf is imported
    jaxtyping.install_import_hook("gaf", "typechecker.check")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
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
    try:
        return pipe.recv() if pipe.poll(120) else (None, "no answer within 120 s")
    except EOFError:
        return None, "the process is gone"


class Ranks:
    """W gloo processes; `run` gives a task to each and returns what each returned."""

    def __init__(self, world: int, timeout: float = TIMEOUT) -> None:
        self.world, self.folder = world, tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, store, there, timeout), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((task, args))
        results = [answer(pipe) for pipe in self.pipes]
        errors = [
            f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error is not None
        ]
        if errors:
            self.broken = True
            raise AssertionError("\n".join(errors))
        return [result for result, _ in results]

    broken = False

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if self.broken:
                process.kill()
            else:
                pipe.send((None, ()))
            process.join(10)
        self.folder.cleanup()
