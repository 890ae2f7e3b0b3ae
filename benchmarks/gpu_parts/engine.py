"""The lab's engine: a step that never waits, captured as a CUDA graph.

On a CPU it runs without a capture. Packages that the lab imports and this file does not need
(downloads, pictures, progress bars) may be missing: a stand-in replaces them.
"""

import dataclasses
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

import gaf
from gpu_parts.common import (
    EXACT,
    NEEDS_CUDA,
    Found,
    Line,
    Options,
    Step,
    lines,
    no_wait,
    ratios,
    relative,
    silence,
)

if importlib.util.find_spec("numpy") is None:
    import torch._dynamo  # looks for numpy too, and must not find the stand-in

for module in (
    "numpy",
    "pooch",
    "requests",
    "rich",
    "rich.console",
    "rich.progress",
    "PIL",
    "PIL.Image",
):
    if isinstance(sys.modules.get(module.split(".")[0]), MagicMock) or (
        importlib.util.find_spec(module.split(".")[0]) is None
    ):
        sys.modules[module] = MagicMock()

from gaf_lab.records import environment  # noqa: E402
from gaf_lab.records.checkpoint import CHECKPOINT_FILE  # noqa: E402
from gaf_lab.settings.config import TrainConfig  # noqa: E402
from gaf_lab.training.device_engine import OnDevice  # noqa: E402
from gaf_lab.training.loop import Training  # noqa: E402
from gaf_lab.training.run import train  # noqa: E402
from gaf_lab.training.run_context import RunContext  # noqa: E402
from gaf_lab.training.tables import AHEAD  # noqa: E402
from gaf_lab.training.together import train_together  # noqa: E402

if isinstance(sys.modules["numpy"], MagicMock):
    environment.versions = lambda: {"torch": torch.__version__}

CHECKED: dict[str, Line] = {
    "GAF": {},
    "GAF, start best": {"start": "best"},
    "GAF, start worst": {"start": "worst"},
    "GAF, halving": {"average": "halving", "schedule": "cosine", "schedule_waits": True},
    "averaging": {"policy": "mean", "schedule": "cosine"},
    "random skip": {"policy": "random-skip"},
    "AdamW": {"optimizer": "adamw", "lr": 0.001},
    "bfloat16": {"autocast": "bfloat16"},
    "channels last": {"channels_last": True},
    "augmentation": {"augment": True},
}
WEIGHED: dict[str, Line] = {
    "averaged weights": {"policy": "gaf", "tau": 1.1},
    "sample weights": {"policy": "mean", "k": 1, "agreement": "prototype"},
    "sample weights with ELR": {"policy": "mean", "k": 1, "agreement": "prototype", "loss": "elr"},
    "restart": {"policy": "mean", "k": 1, "audit_passes": 0.5, "suspects": "none", "loss": "elr"},
}
# of distances: float32 rounding over some tens of steps, and convolution algorithms that a
# library may choose anew
CLOSE = 1e-3
STATE_CLOSE = 1e-2  # of what weights and statistics are at a run's end, relative


def engine(options: Options) -> Iterator[Line]:
    """Decisions are the plain path's, no call waits, runs side by side are what they are alone."""
    silence()
    for what, changes in CHECKED.items():
        yield from lines(f"engine, {what}", partial(same_decisions, options, changes))
    for what, changes in WEIGHED.items():
        yield from lines(f"engine, {what}", partial(same_state, options, changes))
    for what, changes in {"GAF": {}, **WEIGHED}.items():
        yield from lines(f"engine, {what}", partial(no_call_waits, options, changes))
    yield from lines("engine, 4 runs side by side", partial(same_side_by_side, options))


def small(options: Options, **changes: Any) -> TrainConfig:
    """Some tens of steps of a small network; pictures are noise."""
    base = TrainConfig(
        dataset="noise",
        limit=400,
        model="convnet",
        k=4,
        b=20,
        passes=4.0,
        eval_every=4.0,
        lr=0.02,
        tau=0.9,
        nesterov=True,
        probe=100,
    )
    if options.small:
        base = dataclasses.replace(base, limit=100, b=5, passes=1.0, eval_every=1.0, probe=20)
    return dataclasses.replace(base, device=options.device.type, **changes)


class Keeps:
    """Keeps every outcome of a run."""

    def __init__(self) -> None:
        self.outcomes: list[gaf.Outcome] = []

    def begin(self, problem: Any, step: int, steps: int) -> None: ...
    def evaluated(self, line: Line) -> None: ...
    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        self.outcomes.append(outcome)


def outcomes(config: TrainConfig) -> list[gaf.Outcome]:
    keeps = Keeps()
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", keeps, keep_checkpoints=False)
    return keeps.outcomes


def same_decisions(options: Options, changes: Line) -> Found:
    plain, ours = (outcomes(small(options, engine=kind, **changes)) for kind in ("plain", "device"))
    pairs = list(zip(plain, ours, strict=True))
    apart = next((i for i, (a, b) in enumerate(pairs) if a.accepted != b.accepted), len(pairs))
    yield "steps until decisions part", apart, len(pairs), EXACT
    far = max((distance_between(a, b) for a, b in itertools.islice(pairs, apart)), default=0.0)
    yield "distances until then", far, 0.0, CLOSE
    yield "whether any step was taken", any(one.stepped for one in ours), True, EXACT


def same_state(options: Options, changes: Line) -> Found:
    """What each engine leaves in its checkpoint: averaged weights, statistics of samples."""
    states = []
    for kind in ("plain", "device"):
        with tempfile.TemporaryDirectory() as folder:
            config = small(options, engine=kind, ema=0.9, **changes)
            train(config, Path(folder) / "run", Keeps())
            states.append(torch.load(Path(folder) / "run" / CHECKPOINT_FILE, weights_only=True))
    plain, ours = states
    yield "updates of the average", *(int(one["average"]["n_averaged"]) for one in states), EXACT
    found = ("averaged weights", "average"), ("statistics of samples", "objective")
    for what, key in found[: 1 + (changes["policy"] == "mean")]:
        a, b = (floats_in(one[key]) for one in (ours, plain))
        yield f"{what}, relative error", relative(a, b), 0.0, STATE_CLOSE


def floats_in(state: Any) -> Tensor:
    """All of them as one vector; of samples, the visits and the sums over them alone."""
    found = []
    for name, value in state.items():
        if isinstance(value, dict):
            found.append(floats_in(value))
        elif isinstance(value, Tensor) and value.is_floating_point():
            part = value[:, :3] if name == "history.table" else value
            found.append(part.double().flatten().cpu())
    return torch.cat(found)


def distance_between(a: gaf.Outcome, b: gaf.Outcome) -> float:
    return max(abs(x - y) for x, y in zip(a.distances, b.distances, strict=True))


def no_call_waits(options: Options, changes: Line) -> Found:
    config = small(options, engine="device", augment=True, ema=0.9, **changes)
    accumulator = Training(config, None).accumulator
    assert isinstance(accumulator, OnDevice)
    accumulator.one.warm_up()
    with no_wait(options):
        accumulator.one()
    yield "calls of a step that wait", 0 if options.cuda else NEEDS_CUDA, 0, EXACT


def same_side_by_side(options: Options) -> Found:
    configs = [small(options, engine="device", seed=seed) for seed in range(4)]
    alone = [[one.accepted for one in outcomes(config)] for config in configs]
    keeps = [Keeps() for _ in configs]
    with tempfile.TemporaryDirectory() as folder:
        ended = train_together(configs, [Path(folder) / str(c.seed) for c in configs], keeps)
    for one in ended:
        if isinstance(one, Exception):
            raise one
    found = [[one.accepted for one in kept.outcomes] for kept in keeps]
    yield (
        "runs whose decisions differ",
        sum(a != b for a, b in zip(found, alone, strict=True)),
        0,
        EXACT,
    )


# --- ratios


def ratios_of_engine(options: Options) -> Iterator[Line]:
    """A step of one run, ResNet18 on 32x32 pictures, over averaging on the plain path."""
    silence()
    plain = "plain path, averaging"
    ways: dict[str, Any] = {
        plain: ("plain", 1, {"policy": "mean"}),
        "plain path, GAF": ("plain", 1, {"tau": 2.0}),
        "engine, averaging": ("device", 1, {"policy": "mean"}),
        "engine, GAF": ("device", 1, {"tau": 2.0}),
        "engine, GAF start best": ("device", 1, {"tau": 2.0, "start": "best"}),
        "engine, GAF, 4 runs at once": ("device", 4, {"tau": 2.0}),
    }
    runs = {name: Runs(options, *way) for name, way in ways.items()}
    steps: dict[str, Step] = {name: one.block_of_steps for name, one in runs.items()}
    for one in steps.values():
        one()
    for line in ratios(options, "engine", plain, steps):
        count = ways[line["name"].removeprefix("engine: ")][1]
        yield per_run(line, count, runs[plain].block)


def per_run(line: Line, count: int, block: int) -> Line:
    """From a block of steps of several runs to one step of one run."""
    shared = {name: line[name] / count for name in ("ratio_median", "ratio_p10", "ratio_p90")}
    ours = {"ms_median": line["ms_median"] / (count * block)}
    return (
        line | shared | ours | {"plain_ms_median": line["plain_ms_median"] / block, "runs": count}
    )


class Runs:
    """Some runs of one config, each in its own place, that take a block of steps together."""

    def __init__(self, options: Options, kind: str, count: int, changes: Line) -> None:
        self.block = 2 if options.small else 4
        size: Line = {"model": "resnet18", "k": 4, "b": 100, "limit": 10_000}
        size = {"model": "convnet", "k": 2, "b": 5, "limit": 60} if options.small else size
        config = TrainConfig(
            dataset="noise",
            engine=kind,
            device=options.device.type,
            augment=True,
            passes=1000.0,
            lr=0.01,
            nesterov=True,
            weight_decay=5e-4,
            **size,
            **changes,
        )  # type: ignore[arg-type]
        self.places = [RunContext() for _ in range(count)]
        self.trainings = []
        for seed, place in enumerate(self.places):
            with place.enter():
                self.trainings.append(Training(dataclasses.replace(config, seed=seed), None))
        assert self.block <= AHEAD

    def block_of_steps(self) -> None:
        for training, place in zip(self.trainings, self.places, strict=True):
            if isinstance(training.accumulator, OnDevice):
                steps = range(training.step, training.step + self.block)
                with place.enter():
                    training.accumulator.launch(steps, [0.01] * self.block)
        for training, place in zip(self.trainings, self.places, strict=True):
            with place.enter():
                if isinstance(training.accumulator, OnDevice):
                    training.accumulator.fetch()
                for _ in range(self.block):
                    training.macro_batch()
