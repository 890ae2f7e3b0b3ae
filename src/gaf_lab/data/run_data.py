"""The data of a run on its device, one micro-batch at a time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gaf_lab.data.checksum import hash_data
from gaf_lab.data.items import Items, MicroBatches
from gaf_lab.data.problem import Augmentation, Problem
from gaf_lab.data.read_ahead import Reader
from gaf_lab.data.samples import Samples
from gaf_lab.data.sampling import Sampler, generator
from gaf_lab.data.trees import map_tensors, move_to, rows_of
from gaf_lab.records.score import ACCURACY, LOSS, Score
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig


@dataclass(frozen=True, eq=False)
class RunData:
    """All the data of one run, on its device.

    Attributes:
        problem: what the task's function returned.
        classes: how many there are; 0 if the targets are no classes.
        train, heldout: disjoint parts of the training set, with noisy targets.
        test: clean, only reported.
        probe: the training samples on which memorisation is measured.
        reader: reads micro-batches of a Dataset ahead; None if nothing is read ahead.
        origin: position of each sample of `train` in the data set's training samples, (N,) on
            the CPU.
    """

    config: TrainConfig
    problem: Problem
    device: torch.device
    classes: int
    train: Samples
    heldout: Samples
    test: Samples
    probe: Samples
    sampler: Sampler
    reader: Reader | None
    origin: Tensor

    @property
    def steps(self) -> int:
        return max(1, round(self.config.passes * len(self.train) / (self.config.k * self.config.b)))

    @property
    def score(self) -> Score:
        """What the run is judged by."""
        if self.problem.metric is not None:
            return self.problem.metric.score
        return ACCURACY if self.classes else LOSS

    @cached_property
    def checksum(self) -> str:
        """Of the task's training data, as its function returned them."""
        return hash_data(self.problem.train)

    def new_model(self) -> nn.Module:
        """The task's model, on the device, in the config's memory format."""
        model = self.problem.new_model().to(self.device)
        if self.config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def evaluation(self, step: int) -> int | None:
        """The number, counted from 1, of the evaluation due after `step` steps; None if none is."""
        between = self.config.eval_every * len(self.train) / (self.config.k * self.config.b)
        number = max(1, round(step / between))
        return number if step == max(1, round(number * between)) else None

    def micro_batch(self, step: int, i: int) -> tuple[Any, Any]:
        """Micro-batch i of a step: inputs as the model takes them, and observed targets.

        Depends on seed, step and i alone.
        """
        x, y = self.samples(step, i)
        return self.inputs(x), y

    def samples(self, step: int, i: int) -> tuple[Any, Any]:
        """The inputs of a micro-batch, augmented, and its observed targets."""
        index, read = self.index(step, i), None
        if isinstance(self.train.x, Items):
            number = step * self.config.k + i
            x, read = move_to(self._read(number), self.device)
        else:
            x = rows_of(self.train.x, index)
        if self.problem.augment is not None:
            x = self.problem.augment(x, self._draw(step, i))
        return x, self.train.targets(index, read)

    def _read(self, number: int) -> tuple[Any, Any]:
        if self.reader is not None:
            found: tuple[Any, Any] = self.reader(number)
            return found
        return MicroBatches(self.train.x, self.sampler, self.config.seed, self.config.k)(number)

    def _draw(self, step: int, i: int) -> torch.Generator:
        return generator(self.config.seed, "augment", step, i)

    def augmentation(self, step: int, i: int) -> Tensor | None:
        """What is drawn to augment micro-batch i of a step, on the CPU; None without it."""
        augment = self.problem.augment
        if not isinstance(augment, Augmentation):
            return None
        return augment.draw(self.config.b, self._draw(step, i))

    def index(self, step: int, i: int) -> Tensor:
        """The training samples of micro-batch i of a step, (b,)."""
        return self.sampler.draw(step * self.config.k + i).to(self.device)

    def inputs(self, x: Any) -> Any:
        """Inputs as the model takes them: prepared, in the config's memory format."""
        if self.problem.prepare is not None:
            x = self.problem.prepare(x)
        if self.config.channels_last:
            return map_tensors(as_channels_last, x)
        return x


def as_channels_last(x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise ConfigError(
            "channels_last needs inputs (b, channels, height, width); "
            f"got {tuple(x.shape)}. Leave it off."
        )
    return x.to(memory_format=torch.channels_last)
