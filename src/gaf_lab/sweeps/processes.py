"""A sweep's runs in processes on this machine, which stay from run to run."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

import gaf
from gaf_lab.data.problem import Problem
from gaf_lab.sweeps.sweep import Ended, Job, Told, facts, work


class Teller:
    """Follows a run and tells how far it is, five times a second."""

    def __init__(self, tell: Callable[[Told], None]) -> None:
        self.tell, self.facts, self.at = tell, "", 0.0

    def begin(self, problem: Problem, step: int, steps: int) -> None:
        self.steps = steps
        self.tell(Told(step / steps, self.facts))

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        if time.perf_counter() - self.at > 0.2:
            self.at = time.perf_counter()
            self.tell(Told(step / self.steps, self.facts))

    def evaluated(self, line: dict[str, Any]) -> None:
        self.facts = facts(line)


@dataclass(eq=False)
class Worker:
    process: Any
    pipe: "connection.Connection[Any, Any]"
    job: str | None = None


class Processes:
    """Workers that stay, so that each reads a data set once; one that dies is replaced. They are forks of one that has imported torch."""

    def __init__(self, workers: int) -> None:
        self.limit, self.threads = workers, max(1, (os.cpu_count() or 1) // workers)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.workers: list[Worker] = []

    def room(self) -> int:
        return self.limit - sum(worker.job is not None for worker in self.workers)

    def start(self, job: Job) -> None:
        self.workers = [
            worker for worker in self.workers if worker.job or worker.process.is_alive()
        ]
        worker = (
            next((worker for worker in self.workers if worker.job is None), None) or self._another()
        )
        worker.job = job.name
        with contextlib.suppress(BrokenPipeError):  # it has just died, which events() will tell
            worker.pipe.send(job)

    def _another(self) -> Worker:
        pipe, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, self.threads))
        with unheard(signal.SIGINT):
            process.start()
        theirs.close()
        self.workers.append(Worker(process, pipe))
        return self.workers[-1]

    def events(self, seconds: float) -> Iterator[tuple[str, Told | Ended]]:
        ready = connection.wait([worker.pipe for worker in self.workers], seconds)
        for worker in [worker for worker in self.workers if worker.pipe in ready]:
            try:
                event = worker.pipe.recv()
            except (EOFError, OSError):
                self.workers.remove(worker)
                worker.process.join()
                event = Ended("died", f"its process died with exit code {worker.process.exitcode}.")
            name = worker.job
            if isinstance(event, Ended):
                worker.job = None
            if name is not None:
                yield name, event

    def close(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(10)
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def unheard(signum: signal.Signals) -> Iterator[None]:
    """Processes started meanwhile never hear the signal; this one hears it afterwards."""
    # which otherwise starts meanwhile and unblocks SIGINT (CPython 3.11)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: "connection.Connection[Any, Any]", threads: int) -> None:
    """A worker: one job after the other, until it is told to stop or nobody listens any more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(work(pipe.recv(), Teller(pipe.send)))
