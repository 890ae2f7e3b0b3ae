"""A sweep's runs as tasks on a Ray cluster, one core each. All machines share the runs' folder."""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.exceptions
import torch

from gaf_lab.settings.checks import ConfigError
from gaf_lab.sweeps.jobs import Job, JobEnd, JobProgress
from gaf_lab.sweeps.worker import work

READ_EVERY = 5.0  # seconds between readings of the records of runs in progress


class Tasks:
    """The engine on the cluster at `address`.

    A task whose node dies ends as a worker that dies: the sweep starts its job again.
    """

    def __init__(self, workers: int, address: str) -> None:
        connect(address)
        self.limit, self.jobs, self.read = workers, dict[Any, Job](), time.monotonic()
        self.task = ray.remote(run_task)
        self.path = [str(Path(place).absolute()) for place in sys.path]

    def room(self) -> int:
        return self.limit - len(self.jobs)

    def start(self, job: Job) -> None:
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": int(job.config.device == "cuda"),
            "max_retries": 0,
            "name": job.name,
        }
        self.jobs[self.task.options(**options).remote(job, self.path)] = job

    def events(self, seconds: float) -> Iterator[tuple[str, JobProgress | JobEnd]]:
        if not self.jobs:
            time.sleep(seconds)
            return
        for reference in ray.wait(list(self.jobs), timeout=seconds)[0]:
            yield self.jobs.pop(reference).name, job_end(reference)
        if time.monotonic() - self.read > READ_EVERY:
            self.read = time.monotonic()
            yield from [(job.name, job.recorded_progress()) for job in self.jobs.values()]

    def close(self) -> None:
        ray.shutdown()


def connect(address: str) -> None:
    try:
        if address != "auto":  # ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "address must be that of a running Ray cluster, auto or HOST:PORT; "
            f"got {address!r} ({str(error).splitlines()[0]}). Start one with: ray start --head"
        ) from None


def run_task(job: Job, path: Sequence[str]) -> JobEnd:
    """What runs on a node.

    path: where the sweep finds modules, such as its task's, if the node does not find them itself.
    """
    sys.path += [place for place in path if place not in sys.path]
    torch.set_num_threads(1)
    return work(job, Silent())


def job_end(reference: Any) -> JobEnd:
    try:
        end: JobEnd = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return JobEnd("failed", f"{error.cause!r}")
    except ray.exceptions.RayError as error:
        return JobEnd("died", f"its node or process died ({str(error).split('. ')[0]}).")
    return end


class Silent:
    """Follows a run and reports nothing: its progress is read from its records."""

    def begin(self, *facts: Any) -> None:
        pass

    stepped = evaluated = begin
