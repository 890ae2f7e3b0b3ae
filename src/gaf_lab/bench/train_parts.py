"""The parts of a training step, each timed by itself: data, records, passes, checkpoints."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gaf_lab.bench.plain_loop import fresh_model
from gaf_lab.bench.timing import StepsFunction, StepTime, time_in_turn
from gaf_lab.bench.train_results import BOOKS, DATA, PASSES, SAVING
from gaf_lab.data.problem import Augmentation
from gaf_lab.data.trees import rows_of
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.training.console import ConsoleListener
from gaf_lab.training.device_engine import OnDevice
from gaf_lab.training.device_step import WARM_UP
from gaf_lab.training.interval import Interval
from gaf_lab.training.loop import Training
from gaf_lab.training.objective import make_objective
from gaf_lab.training.tables import draws


def step_parts(training: Training, listener: ConsoleListener) -> dict[str, StepsFunction]:
    """A step's data, its records, and its passes, by name.

    The passes are on one batch that stays the same, and on their own model.
    """
    passes = passes_alone(training)
    data = host_data(training)
    if isinstance(training.accumulator, OnDevice):
        passes = as_graph(passes, training.device)
        data = device_data(training, training.accumulator)
    return {
        DATA: repeat(data),
        BOOKS: repeat(books_alone(training, listener)),
        PASSES: repeat(passes),
    }


def repeat(work: Callable[[], Any]) -> StepsFunction:
    def steps(count: int) -> None:
        for _ in range(count):
            work()

    return steps


def books_alone(training: Training, listener: ConsoleListener) -> Callable[[], None]:
    scratch = Interval(losses=torch.zeros(()), rows=[])

    def books() -> None:
        outcome = training.accumulator.outcome
        if outcome is not None:  # before the first step there is none
            scratch.add(outcome)
            listener.stepped(training.step, outcome)

    return books


def passes_alone(training: Training) -> Callable[[], None]:
    model, objective = fresh_model(training.problem), make_objective(training.problem)
    x, y = training.problem.micro_batch(0, 0)
    index = training.problem.index(0, 0)

    def passes() -> None:
        for _ in range(training.config.k):
            objective(model, x, y, index, 0, 0).backward()
            model.zero_grad()

    return passes


def host_data(training: Training) -> Callable[[], None]:
    """The data of a step as it is drawn for gaf.Accumulator."""
    problem = training.problem

    def data() -> None:
        for i in range(training.config.k):
            problem.micro_batch(training.step, i)
            problem.index(training.step, i)

    return data


def device_data(training: Training, engine: OnDevice) -> Callable[[], None]:
    """The data of a step as the device's engine makes it.

    A row of its tables is drawn on the host, and pictures are transformed on the device.
    """
    problem, tables = training.problem, engine.one.tables
    augment = problem.problem.augment

    def transform() -> None:
        for i in range(training.config.k):
            index = tables["index"][0][i]
            x = rows_of(problem.train.x, index)
            if isinstance(augment, Augmentation):
                x = augment.apply(x, tables["augment"][0][i])
            problem.inputs(x)
            problem.train.labels[index]

    replay = as_graph(transform, training.device)

    def data() -> None:
        replay()
        draws(problem, training.step)

    return data


def as_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work as a CUDA graph, as in the device's engine; on other devices the work itself."""
    if device.type != "cuda":
        return work
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    with torch.cuda.graph(graph, stream=stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def time_saving(training: Training, n: int) -> list[StepTime]:
    """Times n savings of an evaluation's line and checkpoint.

    Each is spread over the steps between two evaluations; the evaluation itself is excluded.
    """
    config = training.config
    steps = config.eval_every * len(training.problem.train) / (config.k * config.b)
    line = {"kind": "eval", "rows": [config.k] * round(steps)}
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            records.append(Path(folder), line)
            checkpoint.save(Path(folder), training.state_dict(Path(folder)))

        found = time_in_turn({SAVING: repeat(save)}, n, 1, training.device)[SAVING]
        return [StepTime(took.wall / steps, took.cpu / steps) for took in found]
