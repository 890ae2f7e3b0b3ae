"""From a config to what is trained on: pictures on the device, noisy labels, the split, and one micro-batch at a time."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf_lab.data import noise
from gaf_lab.data.augment import normalise, shifted, shifts
from gaf_lab.data.imagenet import MicroBatches, Reader
from gaf_lab.data.pictures import Pictures
from gaf_lab.data.sampling import Iid, Sampler, Stratified, generator
from gaf_lab.data.sets import DataSet, imagenet_of, load
from gaf_lab.settings.config import ConfigError, TrainConfig

loaded = lru_cache(maxsize=1)(load)  # a sweep's process trains on the same data set run after run


@dataclass(frozen=True, eq=False)
class Problem:
    """All the data of one run, on its device.

    Attributes:
        train, heldout: disjoint parts of the training set, with noisy labels. test: clean, only reported.
        probe: the training samples on which memorisation is measured.
        reader: of micro-batches whose pictures are in files; None where they are in memory.
        origin: which of the data set's training pictures, in its own order, each of `train` is, (N,) on the CPU.
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
        """Which evaluation, counted from 1, is due after `step` steps; None where none is."""
        between = self.config.eval_every * len(self.train) / (self.config.k * self.config.b)
        number = max(1, round(step / between))
        return number if step == max(1, round(number * between)) else None

    def micro_batch(self, step: int, i: int) -> tuple[Tensor, Tensor]:
        """Micro-batch i of a step: pictures (b, C, H, W) float32 and observed labels (b,). Depends on seed, step and i alone."""
        return self.inputs(self.pictures(step, i)), self.train.observed[self.index(step, i)]

    def pictures(self, step: int, i: int) -> Tensor:
        """The pictures of a micro-batch (b, C, H, W) uint8, augmented."""
        if self.reader is not None:
            return self.reader(step * self.config.k + i).to(self.train.clean.device)
        assert isinstance(self.train.x, Tensor)
        x = self.train.x[self.index(step, i)]
        return (
            shifted(x, self.shifts(step, i).to(x.device, non_blocking=True))
            if self.config.augment
            else x
        )

    def shifts(self, step: int, i: int) -> Tensor:
        """How micro-batch i of a step is augmented, (3, b, 1) on the CPU; see `gaf_lab.data.augment.shifts`."""
        return shifts(self.config.b, generator(self.config.seed, "augment", step, i))

    def index(self, step: int, i: int) -> Tensor:
        """Which training samples micro-batch i of a step holds, (b,)."""
        return self.sampler.draw(step * self.config.k + i).to(self.train.clean.device)

    def inputs(self, x: Tensor) -> Tensor:
        x = normalise(x, self.data.mean, self.data.std)
        return x.to(memory_format=torch.channels_last) if self.config.channels_last else x


def build(
    config: TrainConfig, folder: Path | None, device: torch.device, world: int = 1
) -> Problem:
    """Loads the data, flips labels, splits, all from the config's seed. world: ranks that share the run."""
    found = (
        imagenet_of(config.size, folder)
        if config.dataset == "imagenet"
        else loaded(config.dataset, folder)
    )
    data = limited(found, config.limit)
    observed = observed_labels(config, data)
    whole = Pictures(data.train_x, observed, data.train_y)
    order = torch.randperm(len(whole), generator=generator(config.seed, "split"))
    kept = round(config.heldout * len(whole))
    train, heldout = whole[order[kept:]], whole[order[:kept]]
    probe = train[
        torch.randperm(len(train), generator=generator(config.seed, "probe"))[: config.probe]
    ]
    test = Pictures(data.test_x, data.test_y, data.test_y)
    if config.b > len(train):
        raise ConfigError(
            f"b must not exceed the training samples; got {config.b} of {len(train)}. Lower b or heldout."
        )
    sampler = make_sampler(config, train, data.classes)
    reader = make_reader(config, train, sampler, world)
    origin = chosen(data.name, len(found.train_y), config.limit)[order[kept:]]
    return Problem(
        config,
        data,
        train.to(device),
        heldout.to(device),
        test.to(device),
        probe.to(device),
        sampler,
        reader,
        origin,
    )


def chosen(name: str, n: int, limit: int) -> Tensor:
    """Which of a data set's n pictures are used: at most `limit`, the same for every seed; all of them, in order, for 0."""
    return (
        torch.randperm(n, generator=generator(0, name, "limit"))[:limit]
        if limit
        else torch.arange(n)
    )


def limited(data: DataSet, limit: int) -> DataSet:
    """At most `limit` training and as many test pictures, the same for every seed; all of them for 0."""
    if not limit:
        return data
    train, test = (chosen(data.name, len(labels), limit) for labels in (data.train_y, data.test_y))
    human = None if data.human is None else data.human[train]
    parts: dict[str, Any] = {
        "train_x": data.train_x[train],
        "train_y": data.train_y[train],
        "test_x": data.test_x[test],
        "test_y": data.test_y[test],
    }
    return dataclasses.replace(data, **parts, human=human)


def observed_labels(config: TrainConfig, data: DataSet) -> Tensor:
    if config.noise == "human":
        return noise.human(data.train_y, data.human)[0]
    if config.noise == "symmetric":
        return noise.symmetric(data.train_y, config.noise_rate, data.classes, config.seed)[0]
    if config.noise == "asymmetric":
        return noise.asymmetric(
            data.train_y, config.noise_rate, data.classes, config.seed, data.coarse
        )[0]
    return data.train_y


def make_sampler(config: TrainConfig, train: Pictures, classes: int) -> Sampler:
    if config.sampler == "iid":
        return Iid(len(train), config.b, config.seed)
    labels = train.observed if config.sampler == "stratified-observed" else train.clean
    return Stratified(labels, classes, config.b, config.seed)


def make_reader(
    config: TrainConfig, train: Pictures, sampler: Sampler, world: int
) -> Reader | None:
    """Each of `world` ranks computes one micro-batch of a step, so a rank reads every world-th micro-batch."""
    if isinstance(train.x, Tensor):
        return None
    micro_batches = MicroBatches(train.x, sampler, config.seed, config.k, config.augment)
    return Reader(micro_batches, stride=world)
