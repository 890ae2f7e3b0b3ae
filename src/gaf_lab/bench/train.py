"""Training steps per second: averaging and GAF as `gaf train` runs them, and a plain PyTorch loop, in turn in one process.

A step of ours is all that `gaf train` does for it: drawing, augmentation, k micro-gradients, the decision, the optimizer, the
progress bar; on CUDA many are launched at once, as there. The plain loop filters as well, in the way that comes to hand:
pictures one at a time through Pillow, a new DataLoader for each micro-batch, gradients copied out and flattened. Ratios are
of the same round.
"""

import contextlib
import dataclasses
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from gaf_lab.bench.ddp import spread
from gaf_lab.bench.ways import filtered
from gaf_lab.data.augment import shift
from gaf_lab.data.problem import Problem
from gaf_lab.data.sampling import derive_seed
from gaf_lab.progress import Tell, silent
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.fields import DataName, ModelName
from gaf_lab.settings.presets import CIFAR100_GAF
from gaf_lab.training import models
from gaf_lab.training.console import ConsoleListener
from gaf_lab.training.engine import AHEAD, WARM_UP, OnDevice
from gaf_lab.training.run import Interval, Training, make_optimizer
from gaf_lab.training.tables import draws

Steps = Callable[[int], None]  # takes so many

AVERAGING, ALL, PAPER, PLAIN = "averaging", "GAF, tau 2", "GAF, tau 0.97", "plain loop"
ARMS: dict[str, dict[str, Any]] = {
    AVERAGING: {"policy": "mean"},
    ALL: {"tau": 2.0},
    PAPER: {"tau": 0.97},
}
DATA, BOOKS, PASSES, REST = (
    "data and augmentation",
    "records and progress bar",
    "forward and backward",
    "filter and optimizer",
)
SAVING = "checkpoints, spread over steps"
FRESH = 10  # rounds with the same models: where they lie in memory moves times by some percent
# steps between two looks at the clock: a look waits for an accelerator
BLOCK = {"cpu": 1, "cuda": AHEAD}
PADDING = 4
SAVES = 5


@dataclass(frozen=True)
class Options:
    """A benchmark's conditions. data_folder: of CIFAR-100; None takes pictures of white noise of the same shape.

    workers: processes of the plain loop's DataLoader, one row for each.
    """

    data_folder: Path | None = None
    model: ModelName = "resnet18"
    stem: models.Stem = "imagenet"
    k: int = 2
    b: int = 100
    sampler: Literal["iid", "stratified-clean"] = "stratified-clean"
    engine: Literal["auto", "plain", "device"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 30
    workers: tuple[int, ...] = (0,)

    def config(self, **changes: Any) -> TrainConfig:
        """The paper's config of CIFAR-100 (section 4.1) under these conditions."""
        shared = {
            name: getattr(self, name)
            for name in ("model", "stem", "k", "b", "sampler", "engine", "device")
        }
        dataset: DataName = "noise" if self.data_folder is None else "cifar100"
        return dataclasses.replace(CIFAR100_GAF, dataset=dataset, **shared, **changes)


class Took(NamedTuple):
    """Milliseconds of a step: on the clock, and of the CPU, all threads and child processes together, whatever else the machine did."""

    wall: float
    cpu: float

    def __sub__(self, other: "Took") -> "Took":
        return Took(self.wall - other.wall, self.cpu - other.cpu)


def both(name: str, ours: Sequence[Took], base: Sequence[Took]) -> dict[str, float]:
    """Medians, and the ratio to `base` in the same round with its spread, under that name: on the clock, then cpu_."""
    found = spread("", [t.wall for t in ours], [t.wall for t in base]) | spread(
        "cpu_", [t.cpu for t in ours], [t.cpu for t in base]
    )
    return {key.replace("ratio", name): value for key, value in found.items()}


@dataclass(frozen=True)
class Arm:
    """One way to train: what its steps took by rounds, those of averaging and of the first plain loop, and the share of steps taken."""

    name: str
    took: list[Took]
    averaging: list[Took]
    plain: list[Took]
    stepped: float

    def line(self) -> dict[str, Any]:
        """times_plain: steps per second over the plain loop's."""
        own, over = (
            both("ratio", self.took, self.averaging),
            both("times_plain", self.plain, self.took),
        )
        faster = {key: value for key, value in over.items() if "times_plain" in key}
        what = {"kind": "bench-train", "arm": self.name, "rounds": len(self.took)}
        return (
            what
            | {"steps_per_second": 1000 / own["ms_median"], "stepped": self.stepped}
            | own
            | faster
        )


@dataclass(frozen=True)
class Part:
    """One part of GAF's step: what it took by rounds, and what whole steps did."""

    name: str
    took: list[Took]
    whole: list[Took]

    def line(self) -> dict[str, Any]:
        return {"kind": "bench-train-part", "part": self.name, "rounds": len(self.took)} | both(
            "share", self.took, self.whole
        )


def train(options: Options, tell: Tell = silent) -> list[Arm | Part]:
    """Measures every arm, every plain loop, and the parts of GAF's step, a block of each in turn, `rounds` times. tell: how far it is."""
    check(options)
    times: dict[str, list[Took]] = {}
    rows: dict[str, list[int]] = {name: [] for name in ARMS}
    with drawn_nowhere() as listener:
        for start in range(0, options.rounds, FRESH):
            tell("all arms", start, options.rounds)
            trainings = {
                name: Training(options.config(**changes), options.data_folder)
                for name, changes in ARMS.items()
            }
            listener.begin(trainings[ALL].problem, 0, trainings[ALL].problem.steps)
            block = BLOCK[trainings[ALL].device.type]
            work = steps_of(options, trainings, listener)
            for name, found in in_turn(
                work, min(FRESH, options.rounds - start), block, trainings[ALL].device
            ).items():
                times[name] = times.get(name, []) + found
            for name, training in trainings.items():
                rows[name] += training.interval.rows
        saving = saved(trainings[ALL], min(SAVES, options.rounds))
    plain = times[loop_name(options.workers[0])]
    arms = [
        Arm(
            name,
            times[name],
            times[AVERAGING],
            plain,
            sum(map(bool, rows[name])) / len(rows[name]) if name in rows else 1.0,
        )
        for name in (*ARMS, *map(loop_name, options.workers))
    ]
    rest = [
        whole - data - books - passes
        for whole, data, books, passes in zip(
            times[ALL], times[DATA], times[BOOKS], times[PASSES], strict=True
        )
    ]
    parts = {
        DATA: times[DATA],
        BOOKS: times[BOOKS],
        SAVING: saving,
        PASSES: times[PASSES],
        REST: rest,
    }
    return [*arms, *(Part(name, found, times[ALL][: len(found)]) for name, found in parts.items())]


def check(options: Options) -> None:
    if options.rounds < 2:
        raise ConfigError(
            f"rounds must be at least 2, for a spread; got {options.rounds}. Give --rounds 30."
        )
    if not options.workers or min(options.workers) < 0:
        raise ConfigError(
            f"workers must be one number or more, each at least 0; got {options.workers}. Give --workers 0."
        )


def steps_of(
    options: Options, trainings: Mapping[str, Training], listener: ConsoleListener
) -> dict[str, Steps]:
    """Everything that is timed: steps of each arm and plain loop, and the parts of a step by themselves."""
    gaf = trainings[ALL]
    loops = {
        loop_name(n): repeated(PlainLoop(gaf.config, gaf.problem, gaf.device, n).step)
        for n in options.workers
    }
    return (
        {name: partial(run, training, listener) for name, training in trainings.items()}
        | loops
        | parts_of(gaf, listener)
    )


def run(training: Training, listener: ConsoleListener, steps: int) -> None:
    """What `Training.run` does between evaluations."""
    if isinstance(training.accumulator, OnDevice):
        rate = training.optimizer.param_groups[0]["lr"]  # it stays until an evaluation
        training.accumulator.launch(range(training.step, training.step + steps), [rate] * steps)
        training.accumulator.fetch()
    for _ in range(steps):
        outcome = training.macro_batch()
        listener.stepped(training.step, outcome)


def repeated(work: Callable[[], Any]) -> Steps:
    def steps(count: int) -> None:
        for _ in range(count):
            work()

    return steps


def parts_of(training: Training, listener: ConsoleListener) -> dict[str, Steps]:
    """A step's data; its records; its forward and backward passes, on one batch that stays as it is and a model of their own."""
    config, problem = training.config, training.problem
    model = fresh_model(config, problem, training.device)
    x, y = problem.micro_batch(0, 0)
    scratch = Interval(losses=torch.zeros(()), rows=[])

    def books() -> None:
        outcome = training.accumulator.outcome
        if outcome is not None:  # before the first step there is none
            scratch.add(outcome)
            listener.stepped(training.step, outcome)

    def passes() -> None:
        for _ in range(config.k):
            nn.functional.cross_entropy(model(x), y).backward()
            model.zero_grad()

    on_device = isinstance(training.accumulator, OnDevice)
    data = (
        device_data(training, training.accumulator)
        if isinstance(training.accumulator, OnDevice)
        else host_data(training)
    )
    return {
        DATA: repeated(data),
        BOOKS: repeated(books),
        PASSES: repeated(captured(passes, training.device) if on_device else passes),
    }


def host_data(training: Training) -> Callable[[], None]:
    """The data of a step as gaf.Accumulator's loop asks for it."""
    problem = training.problem

    def data() -> None:
        for i in range(training.config.k):
            problem.micro_batch(training.step, i)
            problem.index(training.step, i)

    return data


def device_data(training: Training, engine: OnDevice) -> Callable[[], None]:
    """The data of a step as the device's engine makes it: a row of its tables on the host, pictures on the device."""
    problem, tables = training.problem, engine.one.tables
    assert isinstance(problem.train.x, Tensor)
    pictures = problem.train.x

    def made() -> None:
        for i in range(training.config.k):
            index = tables["index"][0][i]
            problem.inputs(shift(pictures[index], tables["shifts"][0][i]))
            problem.train.observed[index]

    replay = captured(made, training.device)

    def data() -> None:
        replay()
        draws(problem, training.step)

    return data


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work as a CUDA graph, as the device's engine has it; elsewhere the work itself."""
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


def fresh_model(config: TrainConfig, problem: Problem, device: torch.device) -> nn.Module:
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return models.build(config.model, problem.shape, problem.classes, config.stem).to(device)


def saved(training: Training, n: int) -> list[Took]:
    """An evaluation's line and checkpoint, spread over the steps between two evaluations, n times; evaluating itself excluded."""
    config = training.config
    steps = config.eval_every * len(training.problem.train) / (config.k * config.b)
    line = {"kind": "eval", "rows": [config.k] * round(steps)}
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            records.append(Path(folder), line)
            checkpoint.save(Path(folder), training.state_dict(Path(folder)))

        found = in_turn({SAVING: repeated(save)}, n, 1, training.device)[SAVING]
        return [Took(took.wall / steps, took.cpu / steps) for took in found]


@contextlib.contextmanager
def drawn_nowhere() -> Iterator[ConsoleListener]:
    """The console of `gaf train`, which does all its work and shows nothing."""
    with Path(os.devnull).open("w") as nowhere:
        listener = ConsoleListener(Console(file=nowhere, force_terminal=True))
        try:
            yield listener
        finally:
            listener.close()


def in_turn(
    work: Mapping[str, Steps], rounds: int, block: int, device: torch.device
) -> dict[str, list[Took]]:
    """What one step of each took, in every round; the one that begins changes from round to round.

    Args:
        work: what is timed, by name.
        rounds: how many, after one that is not counted.
        block: steps between two looks at the clock.
        device: is waited for at each look.
    """
    names = list(work)
    found: dict[str, list[Took]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = now(device)
            work[name](block)
            later = now(device)
            found[name].append(
                Took(1000 * (later[0] - wall) / block, 1000 * (later[1] - cpu) / block)
            )
    return {name: times[1:] for name, times in found.items()}


def now(device: torch.device) -> tuple[float, float]:
    """Seconds on the clock and of the CPU, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


# ---------------------------------------------------------------------------------------------- the plain loop


class OnePicture(Dataset[tuple[Tensor, int]]):
    """Pictures transformed one at a time: Pillow image, random crop with padding 4, mirrored with probability 1/2, tensor, normalised.

    Args:
        x: (N, 3, H, W) uint8 on the CPU. y: labels (N,).
        mean, std: per channel, of pictures in [0, 1].
    """

    def __init__(
        self, x: Tensor, y: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.pixels, self.labels = x.permute(0, 2, 3, 1).contiguous().numpy(), y.tolist()
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.pixels[index])
        width, height = picture.size
        left, top = torch.randint(2 * PADDING + 1, (2,)).tolist()
        picture = ImageOps.expand(picture, PADDING).crop((left, top, left + width, top + height))
        if torch.rand(()) < 0.5:
            picture = ImageOps.mirror(picture)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255
        return (x - self.mean) / self.std, self.labels[index]


def loop_name(workers: int) -> str:
    return PLAIN if workers == 0 else f"{PLAIN}, {workers} workers"


class PlainLoop:
    """GAF without this library, tau = 2: each micro-batch through a DataLoader of its own, its gradient copied out of p.grad.

    Args:
        config: gives k, b, sampler, model and optimizer. problem: gives the pictures.
        workers: processes of each DataLoader.
    """

    def __init__(
        self, config: TrainConfig, problem: Problem, device: torch.device, workers: int
    ) -> None:
        self.config, self.device, self.workers = config, device, workers
        train = problem.train
        assert isinstance(train.x, Tensor)
        self.data = OnePicture(
            train.x.cpu(), train.observed.cpu(), problem.data.mean, problem.data.std
        )
        classes = [(train.clean == c).nonzero().flatten().tolist() for c in range(problem.classes)]
        self.groups = [list(range(len(train)))] if config.sampler == "iid" else classes
        self.model = fresh_model(config, problem, device)
        self.optimizer = make_optimizer(config, config.lr, list(self.model.parameters()))
        self.random = random.Random(config.seed)

    def draw(self) -> list[int]:
        """Which samples a micro-batch holds: as many of each class, or any."""
        return [
            i
            for group in self.groups
            for i in self.random.sample(group, self.config.b // len(self.groups))
        ]

    def micro_gradient(self) -> Tensor:
        """(n,), a copy."""
        loader = DataLoader(
            Subset(self.data, self.draw()),
            batch_size=self.config.b,
            shuffle=True,
            num_workers=self.workers,
        )
        self.optimizer.zero_grad()
        for x, y in loader:
            nn.functional.cross_entropy(self.model(x.to(self.device)), y.to(self.device)).backward()
        copies = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in copies])

    def step(self) -> None:
        update = filtered([self.micro_gradient() for _ in range(self.config.k)])
        params = list(self.model.parameters())
        for p, part in zip(params, update.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()


# ---------------------------------------------------------------------------------------------- what is shown


def arm_table(found: list[Arm | Part]) -> Table:
    result = Table(title="Training steps", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("arm", "steps/s", "ratio", "10-90%", "CPU", "x plain", "taken"):
        result.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for line in (m.line() for m in found if isinstance(m, Arm)):
        between = f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}"
        ratios = (
            f"{line['ratio_median']:.3f}",
            between,
            f"{line['cpu_ratio_median']:.3f}",
            f"{line['times_plain_median']:.2f}",
        )
        result.add_row(
            line["arm"], f"{line['steps_per_second']:.2f}", *ratios, f"{100 * line['stepped']:.0f}%"
        )
    result.caption = (
        "medians; ratio: time over averaging's in the same round, CPU: by CPU time\n"
        "x plain: steps per second over the plain loop's; taken: share of steps"
    )
    return result


def part_table(found: list[Arm | Part]) -> Table:
    result = Table(title=f"Where a step of {ALL} goes", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("part", "ms", "share", "10-90%", "CPU"):
        result.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for line in (m.line() for m in found if isinstance(m, Part)):
        between = f"{100 * line['share_p10']:.2f}-{100 * line['share_p90']:.2f}%"
        result.add_row(
            line["part"],
            f"{line['ms_median']:.2f}",
            f"{100 * line['share_median']:.2f}%",
            between,
            f"{100 * line['cpu_share_median']:.2f}%",
        )
    result.caption = f"each by itself in the same round, CPU: by CPU time\n{REST}: what is left"
    return result


def conditions(options: Options) -> dict[str, Any]:
    config = options.config()
    kept = (
        "dataset",
        "model",
        "stem",
        "k",
        "b",
        "sampler",
        "augment",
        "noise",
        "noise_rate",
        "engine",
        "device",
    )
    return {name: getattr(config, name) for name in kept} | {
        "rounds": options.rounds,
        "workers": options.workers,
    }
