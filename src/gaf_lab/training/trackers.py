"""A run's numbers in TensorBoard, Weights & Biases or trackio."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gaf
from gaf_lab.data.run_data import RunData
from gaf_lab.settings.checks import ConfigError

Numbers = dict[str, float]
Log = Callable[[Numbers, int], Any]


def metrics(line: dict[str, Any]) -> Numbers:
    """The finite numbers of an evaluation line, by name, without the samples, which are the axis.

    The step is named `steps`, because trackio reserves `step` for the axis.
    """
    found: Numbers = {}
    for key, value in line.items():
        if key != "samples" and isinstance(value, int | float) and math.isfinite(value):
            found["steps" if key == "step" else key] = value
    return found


def check_installed(names: Sequence[str]) -> None:
    """ConfigError if a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"tracker {name}: its package must be installed; it is not. "
                "Install it with pip install '.[trackers]'."
            )


class TrackerListener:
    """Sends every number of an evaluation line to a tracker, over samples seen."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.close: Callable[[], Any] = lambda: None

    def begin(self, problem: RunData, step: int, steps: int) -> None:
        self.log, self.close = OPEN[self.name](self.folder, problem.config.plain())

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        pass

    def evaluated(self, line: dict[str, Any]) -> None:
        self.log(metrics(line), line["samples"])


def tensorboard(folder: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], Any]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", str(config))

    def log(numbers: Numbers, samples: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, samples)

    return log, writer.close


def wandb(folder: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], Any]]:
    import wandb

    try:
        run = wandb.init(project="gaf", name=folder.name, dir=folder, config=config)
    except wandb.Error as error:
        raise ConfigError(
            f"tracker wandb: a run must be begun; wandb says: {error} "
            "Log in, or set WANDB_MODE=offline."
        ) from None
    return lambda numbers, samples: run.log(numbers, step=samples, commit=True), run.finish


def trackio(folder: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], Any]]:
    import trackio

    run = trackio.init(project="gaf", name=folder.name, config=config, embed=False)
    return lambda numbers, samples: run.log(numbers, step=samples), run.finish


OPEN = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
