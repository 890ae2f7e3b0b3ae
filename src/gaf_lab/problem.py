"""From a config to what is trained on: pictures on the device, noisy labels, the split, and one micro-batch at a time."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf_lab import noise
from gaf_lab.augment import crop_and_flip, normalise
from gaf_lab.config import ConfigError, TrainConfig
from gaf_lab.data import DataSet, load
from gaf_lab.sampling import Iid, Sampler, Stratified, generator

loaded = lru_cache(maxsize=1)(load)  # a sweep's process trains on the same data set run after run


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures (N, C, H, W) uint8 and their labels (N,): observed is trained on, clean is the truth."""

    x: Tensor
    observed: Tensor
    clean: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> "Pictures":
        return Pictures(self.x[index], self.observed[index], self.clean[index])


@dataclass(frozen=True, eq=False)
class Problem:
    """All the data of one run, on its device.

    Attributes:
        train, heldout: disjoint parts of the training set, with noisy labels. test: clean, only reported.
        probe: the training samples on which memorisation is measured.
    """

    config: TrainConfig
    data: DataSet
    train: Pictures
    heldout: Pictures
    test: Pictures
    probe: Pictures
    sampler: Sampler

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
        index = self.index(step, i)
        x = self.train.x[index]
        if self.config.augment:
            x = crop_and_flip(x, generator(self.config.seed, "augment", step, i))
        return self.inputs(x), self.train.observed[index]

    def index(self, step: int, i: int) -> Tensor:
        """Which training samples micro-batch i of a step holds, (b,)."""
        return self.sampler.draw(step * self.config.k + i).to(self.train.x.device)

    def inputs(self, x: Tensor) -> Tensor:
        x = normalise(x, self.data.mean, self.data.std)
        return x.to(memory_format=torch.channels_last) if self.config.channels_last else x


def build(config: TrainConfig, folder: Path | None, device: torch.device) -> Problem:
    """Loads the data, flips labels, splits, all from the config's seed."""
    data = limited(loaded(config.dataset, folder), config.limit)
    observed = observed_labels(config, data)
    whole = Pictures(data.train_x, observed, data.train_y)
    order = torch.randperm(len(whole), generator=generator(config.seed, "split"))
    kept = round(config.heldout * len(whole))
    train, heldout = whole[order[kept:]], whole[order[:kept]]
    probe = train[torch.randperm(len(train), generator=generator(config.seed, "probe"))[: config.probe]]
    test = Pictures(data.test_x, data.test_y, data.test_y)
    if config.b > len(train):
        raise ConfigError(f"b must not exceed the training samples; got {config.b} of {len(train)}. Lower b or heldout.")
    sampler = make_sampler(config, train, data.classes)
    return Problem(config, data, on(train, device), on(heldout, device), on(test, device), on(probe, device), sampler)


def limited(data: DataSet, limit: int) -> DataSet:
    """At most `limit` training and as many test pictures, the same for every seed; all of them for 0."""
    if not limit:
        return data
    train, test = (torch.randperm(n, generator=generator(0, data.name, "limit"))[:limit] for n in (len(data.train_y), len(data.test_y)))
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
        return noise.asymmetric(data.train_y, config.noise_rate, data.classes, config.seed, data.coarse)[0]
    return data.train_y


def make_sampler(config: TrainConfig, train: Pictures, classes: int) -> Sampler:
    if config.sampler == "iid":
        return Iid(len(train), config.b, config.seed)
    labels = train.observed if config.sampler == "stratified-observed" else train.clean
    return Stratified(labels, classes, config.b, config.seed)


def on(part: Pictures, device: torch.device) -> Pictures:
    return Pictures(part.x.to(device), part.observed.to(device), part.clean.to(device))
