"""A sweep's runs in processes on this machine; a process takes one run after the other."""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

from gaf_lab.plain_warnings import plain_warnings
from gaf_lab.sweeps.jobs import Job, JobEnd, JobProgress
from gaf_lab.sweeps.worker import Reporter, work

# what each worker would import at its first run: torch._dynamo by way of an optimizer
PRELOADED = (__name__, "torch._dynamo", "gaf_lab.tasks.pictures")


@dataclass(eq=False)
class Worker:
    """A process. job: the name of the one that it is working on."""

    process: Any
    pipe: "connection.Connection[Any, Any]"
    job: str | None = None


class Processes:
    """Workers that stay, so that each reads a data set once; one that dies is replaced.

    They are forks of a process that has imported all that a run needs.
    """

    def __init__(self, workers: int) -> None:
        self.limit, self.threads = workers, max(1, torch.get_num_threads() // workers)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        self.workers: list[Worker] = []

    def room(self) -> int:
        return self.limit - sum(worker.job is not None for worker in self.workers)

    def start(self, job: Job) -> None:
        self.workers = [each for each in self.workers if each.job or each.process.is_alive()]
        idle = [each for each in self.workers if each.job is None]
        worker = idle[0] if idle else self._add_worker()
        worker.job = job.name
        with contextlib.suppress(BrokenPipeError):  # it has just died, which events() reports
            worker.pipe.send(job)

    def _add_worker(self) -> Worker:
        pipe, theirs = self.context.Pipe()
        process = self.context.Process(target=serve_jobs, args=(theirs, self.threads))
        with signal_blocked(signal.SIGINT):
            process.start()
        theirs.close()
        self.workers.append(Worker(process, pipe))
        return self.workers[-1]

    def events(self, seconds: float) -> Iterator[tuple[str, JobProgress | JobEnd]]:
        ready = connection.wait([worker.pipe for worker in self.workers], seconds)
        for worker in [worker for worker in self.workers if worker.pipe in ready]:
            try:
                event = worker.pipe.recv()
            except (EOFError, OSError):
                event = self._bury(worker)
            name = worker.job
            if isinstance(event, JobEnd):
                worker.job = None
            if name is not None:
                yield name, event

    def _bury(self, worker: Worker) -> JobEnd:
        self.workers.remove(worker)
        worker.process.join()
        return JobEnd("died", f"its process died with exit code {worker.process.exitcode}.")

    def close(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(10)
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def signal_blocked(signum: signal.Signals) -> Iterator[None]:
    """Processes started inside never receive the signal; this process receives it afterwards."""
    # Started now, because its start would unblock SIGINT inside (CPython 3.11).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_jobs(pipe: "connection.Connection[Any, Any]", threads: int) -> None:
    """A worker: does one job after the other, until it is terminated or the sweep is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(threads)
    gone = contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError)
    with gone, plain_warnings():
        while True:
            pipe.send(work(pipe.recv(), Reporter(pipe.send)))
