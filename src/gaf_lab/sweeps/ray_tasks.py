"""A sweep's runs as tasks on a Ray cluster: one core each; the folder of the runs is shared by all its machines."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.exceptions
import torch

from gaf_lab.settings.config import ConfigError
from gaf_lab.sweeps.sweep import Ended, Job, Told, work

LOOK_EVERY = 5.0  # seconds between looks into the records of runs that are being worked on


class Tasks:
    """The engine on the cluster at `address`. A task whose node dies ends as a worker does: the sweep starts its job again."""

    def __init__(self, workers: int, address: str) -> None:
        try:
            if address != "auto":  # ray would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError) as error:
            raise ConfigError(f"address must be that of a running Ray cluster, auto or HOST:PORT; got {address!r} "
                              f"({str(error).splitlines()[0]}). Start one with: ray start --head") from None  # fmt: skip
        self.limit, self.jobs, self.looked = workers, dict[Any, Job](), time.monotonic()
        self.task = ray.remote(task)

    def room(self) -> int:
        return self.limit - len(self.jobs)

    def start(self, job: Job) -> None:
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": int(job.config.device == "cuda"),
            "max_retries": 0,
            "name": job.name,
        }
        self.jobs[self.task.options(**options).remote(job)] = job

    def events(self, seconds: float) -> Iterator[tuple[str, Told | Ended]]:
        if not self.jobs:
            time.sleep(seconds)
            return
        for reference in ray.wait(list(self.jobs), timeout=seconds)[0]:
            yield self.jobs.pop(reference).name, outcome(reference)
        if time.monotonic() - self.looked > LOOK_EVERY:
            self.looked = time.monotonic()
            yield from [(job.name, job.done()) for job in self.jobs.values()]

    def close(self) -> None:
        ray.shutdown()


def task(job: Job) -> Ended:
    """What runs on a node."""
    torch.set_num_threads(1)
    return work(job, Silent())


def outcome(reference: Any) -> Ended:
    try:
        ended: Ended = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return Ended("failed", f"{error.cause!r}")
    except ray.exceptions.RayError as error:
        return Ended("died", f"its node or process died ({str(error).split('. ')[0]}).")
    return ended


class Silent:
    """Follows a run and says nothing: how far it is stands in its records."""

    def begin(self, *facts: Any) -> None:
        pass

    stepped = evaluated = begin
