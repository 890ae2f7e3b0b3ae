"""Processes that take training steps on demand, one for each number of threads."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from gaf_lab.bench.cpu_settings import Setting, all_settings
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.loop import Training

Layout = tuple[bool, bool]  # channels-last, compiled


class Crew:
    """Processes for a model, by the number of their threads and whether these spin.

    There are as many with one thread as there are cores.
    """

    def __init__(self, config: TrainConfig, cores: int) -> None:
        self.pipes: dict[tuple[int, bool], list[Any]] = {}
        self.processes: list[Any] = []
        kinds = sorted({(s.threads, s.spin) for s in all_settings(cores)})
        for threads, spin in [(1, False)] * (cores - 1) + kinds:
            with wait_policy(spin):
                pipe = self._add_process(threads, config)
            self.pipes.setdefault((threads, spin), []).append(pipe)

    def _add_process(self, threads: int, config: TrainConfig) -> Any:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, threads, config)
        self.processes.append(context.Process(target=serve_steps, args=arguments, daemon=True))
        self.processes[-1].start()
        theirs.close()
        return ours

    def steps(self, setting: Setting, steps: int) -> float | str:
        """Seconds until each of the setting's processes has taken the steps; or one's error."""
        pipes = self.pipes[setting.threads, setting.spin][: setting.processes]
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send((setting.channels_last, setting.compile, steps))
        answers = [receive(pipe) for pipe in pipes]
        seconds = time.perf_counter() - started
        return next((answer for answer in answers if isinstance(answer, str)), seconds)

    def close(self) -> None:
        for pipe in itertools.chain(*self.pipes.values()):
            with contextlib.suppress(OSError):  # the process has died
                pipe.send(None)
        for process in self.processes:
            process.join()


def receive(pipe: Any) -> float | str:
    try:
        answer: float | str = pipe.recv()
        return answer
    except EOFError:
        return "its process died"


@contextlib.contextmanager
def wait_policy(spin: bool) -> Iterator[None]:
    """Threads of processes started inside sleep while they wait, or do OpenMP's default.

    OpenMP reads the variable when it is loaded.
    """
    name = "OMP_WAIT_POLICY"
    before = os.environ.pop(name, None)
    os.environ.update({} if spin else {name: "passive"})
    try:
        yield
    finally:
        os.environ.pop(name, None)
        os.environ.update({} if before is None else {name: before})


def serve_steps(pipe: Any, threads: int, config: TrainConfig) -> None:
    """A process of the crew: (channels_last, compile, steps) -> seconds, or an error's first line.

    It ends at None.
    """
    torch.set_num_threads(threads)
    trainings: dict[Layout, Training] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has exited
        for last, compiled, steps in iter(pipe.recv, None):
            changed = dataclasses.replace(config, channels_last=last, compile=compiled)
            pipe.send(try_steps(trainings, changed, steps))


def try_steps(trainings: dict[Layout, Training], config: TrainConfig, steps: int) -> float | str:
    try:
        return take_steps(trainings, config, steps)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def take_steps(trainings: dict[Layout, Training], config: TrainConfig, steps: int) -> float:
    """Seconds of the steps; the first time, with building the training."""
    started = time.perf_counter()
    layout = config.channels_last, config.compile
    if layout not in trainings:
        trainings[layout] = Training(config, None)
    for _ in range(steps):
        trainings[layout].macro_batch()
    return time.perf_counter() - started
