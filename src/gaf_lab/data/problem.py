"""From a config to training data: noisy labels, the split, and one micro-batch at a time."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf_lab.data import noise
from gaf_lab.data.augment import draw_shifts, normalise, shift
from gaf_lab.data.dataset import DataSet
from gaf_lab.data.files import MicroBatches
from gaf_lab.data.imbalance import keep_only, long_tail
from gaf_lab.data.pictures import Pictures
from gaf_lab.data.read_ahead import Reader
from gaf_lab.data.sampling import Iid, Sampler, Sharded, Stratified, generator
from gaf_lab.data.sets import imagenet_of, load_once
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig


@dataclass(frozen=True, eq=False)
class Problem:
    """All the data of one run, on its device.

    Attributes:
        train, heldout: disjoint parts of the training set, with noisy labels.
        test: clean, only reported.
        probe: the training samples on which memorisation is measured.
        reader: reads micro-batches whose pictures are in files; None if they are in memory.
        origin: position of each picture of `train` in the data set's training pictures, (N,) on
            the CPU.
    """

    config: TrainConfig
    data: DataSet
    train: Pictures
    heldout: Pictures
    test: Pictures
    probe: Pictures
    sampler: Sampler
    reader: Reader | None
    origin: Tensor

    @property
    def steps(self) -> int:
        return max(1, round(self.config.passes * len(self.train) / (self.config.k * self.config.b)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        channels, height, width = self.data.train_x.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        return self.data.classes

    def evaluation(self, step: int) -> int | None:
        """The number, counted from 1, of the evaluation due after `step` steps; None if none is."""
        between = self.config.eval_every * len(self.train) / (self.config.k * self.config.b)
        number = max(1, round(step / between))
        return number if step == max(1, round(number * between)) else None

    def micro_batch(self, step: int, i: int) -> tuple[Tensor, Tensor]:
        """Micro-batch i of a step: pictures (b, C, H, W) float32 and observed labels (b,).

        Depends on seed, step and i alone.
        """
        return self.inputs(self.pictures(step, i)), self.train.observed[self.index(step, i)]

    def pictures(self, step: int, i: int) -> Tensor:
        """The pictures of a micro-batch (b, C, H, W) uint8, augmented."""
        if self.reader is not None:
            return self.reader(step * self.config.k + i).to(self.train.clean.device)
        assert isinstance(self.train.x, Tensor)
        x = self.train.x[self.index(step, i)]
        if not self.config.augment:
            return x
        return shift(x, self.shifts(step, i).to(x.device, non_blocking=True))

    def shifts(self, step: int, i: int) -> Tensor:
        """The augmentation of micro-batch i of a step, (3, b, 1) on the CPU.

        See `gaf_lab.data.augment.draw_shifts`.
        """
        return draw_shifts(self.config.b, generator(self.config.seed, "augment", step, i))

    def index(self, step: int, i: int) -> Tensor:
        """The training samples of micro-batch i of a step, (b,)."""
        return self.sampler.draw(step * self.config.k + i).to(self.train.clean.device)

    def inputs(self, x: Tensor) -> Tensor:
        """Pictures as the model takes them: normalised, in the config's memory format."""
        x = normalise(x, self.data.mean, self.data.std)
        return x.to(memory_format=torch.channels_last) if self.config.channels_last else x


def make_problem(
    config: TrainConfig, folder: Path | None, device: torch.device, world: int = 1
) -> Problem:
    """Loads the data, flips labels, splits: all from the config's seed.

    world: the number of ranks that share the run.
    """
    complete = load_data(config, folder)
    limited = take_subset(complete, config.limit)
    tail = long_tail(limited, config.imbalance)
    data = keep_only(limited, tail)
    observed = observed_labels(config, data)
    whole = Pictures(data.train_x, observed, data.train_y)
    order = torch.randperm(len(whole), generator=generator(config.seed, "split"))
    kept = round(config.heldout * len(whole))
    train, heldout = whole[order[kept:]], whole[order[:kept]]
    probed = torch.randperm(len(train), generator=generator(config.seed, "probe"))[: config.probe]
    if config.b > len(train):
        raise ConfigError(
            f"b must not exceed the training samples; got {config.b} of {len(train)}. "
            "Lower b or heldout."
        )
    sampler = make_sampler(config, train, data.classes)
    return Problem(
        config,
        data,
        train=train.to(device),
        heldout=heldout.to(device),
        test=Pictures(data.test_x, data.test_y, data.test_y).to(device),
        probe=train[probed].to(device),
        sampler=sampler,
        reader=make_reader(config, train, sampler, world),
        origin=subset(data.name, len(complete.train_y), config.limit)[tail][order[kept:]],
    )


def load_data(config: TrainConfig, folder: Path | None) -> DataSet:
    if config.dataset == "imagenet":
        return imagenet_of(config.size, folder)
    return load_once(config.dataset, folder)


def subset(name: str, n: int, limit: int) -> Tensor:
    """The indices used of a data set's n pictures: at most `limit`, the same for every seed.

    limit: 0 for all of them, in order.
    """
    if not limit:
        return torch.arange(n)
    return torch.randperm(n, generator=generator(0, name, "limit"))[:limit]


def take_subset(data: DataSet, limit: int) -> DataSet:
    """The data set with at most `limit` training and as many test pictures; all of them for 0."""
    if not limit:
        return data
    train = subset(data.name, len(data.train_y), limit)
    test = subset(data.name, len(data.test_y), limit)
    parts: dict[str, Any] = {
        "train_x": data.train_x[train],
        "train_y": data.train_y[train],
        "test_x": data.test_x[test],
        "test_y": data.test_y[test],
        "human": None if data.human is None else data.human[train],
    }
    return dataclasses.replace(data, **parts)


def observed_labels(config: TrainConfig, data: DataSet) -> Tensor:
    y, rate = data.train_y, config.noise_rate
    if config.noise == "human":
        return noise.human(y, data.human)[0]
    if config.noise == "symmetric":
        return noise.symmetric(y, rate, data.classes, config.seed)[0]
    if config.noise == "asymmetric":
        return noise.asymmetric(y, rate, data.classes, config.seed, data.coarse)[0]
    return y


def make_sampler(config: TrainConfig, train: Pictures, classes: int) -> Sampler:
    if config.sampler == "iid":
        return Iid(len(train), config.b, config.seed)
    if config.sampler == "sharded":
        return Sharded(train.observed != train.clean, config.k, config.b, config.seed)
    labels = train.observed if config.sampler == "stratified-observed" else train.clean
    return Stratified(labels, classes, config.b, config.seed)


def make_reader(
    config: TrainConfig, train: Pictures, sampler: Sampler, world: int
) -> Reader | None:
    """Each of `world` ranks computes one micro-batch of a step: it reads every world-th."""
    if isinstance(train.x, Tensor):
        return None
    micro_batches = MicroBatches(train.x, sampler, config.seed, config.k, config.augment)
    return Reader(micro_batches, stride=world)
