"""From a config to a run's data: the task's function, wrong labels, the split."""

from pathlib import Path

import torch
from torch import Tensor

from gaf_lab.data import noise
from gaf_lab.data.check_arrays import count_by_labels
from gaf_lab.data.check_task import check_task
from gaf_lab.data.imbalance import long_tail
from gaf_lab.data.items import Items, MicroBatches
from gaf_lab.data.problem import Part, Problem, count_samples
from gaf_lab.data.read_ahead import Reader
from gaf_lab.data.run_data import RunData
from gaf_lab.data.samples import Samples
from gaf_lab.data.sampling import Iid, Sampler, Sharded, Stratified, generator
from gaf_lab.data.task import call_task
from gaf_lab.data.trees import rows_of
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig


def make_run_data(
    config: TrainConfig, folder: Path | None, device: torch.device, world: int = 1
) -> RunData:
    """Calls the task, flips labels, splits: all from the config's seed.

    world: the number of ranks that share the run.
    """
    problem = call_task(config, folder)
    used = subset(problem.name, count_samples(problem.train), config.limit)
    tested = subset(problem.name, count_samples(problem.test), config.limit)
    whole = part_of(problem, problem.train, used, config.limit)
    test = part_of(problem, problem.test, tested, config.limit)
    classes = count_classes(problem, whole, test, config.limit)
    check_task(config, problem, whole, test, classes)
    if problem.clean is not None:
        whole = Samples(whole.x, whole.observed, problem.clean[used])
    if config.imbalance > 1:
        kept = long_tail(whole.truth, classes, problem.name, config.imbalance)
        whole, used = whole[kept], used[kept]
    whole = with_noise(config, problem, whole, classes)
    order = torch.randperm(len(whole), generator=generator(config.seed, "split"))
    first = round(config.heldout * len(whole))
    train, heldout = whole[order[first:]], whole[order[:first]]
    probed = torch.randperm(len(train), generator=generator(config.seed, "probe"))[: config.probe]
    check_length_of(config, len(train))
    sampler = make_sampler(config, train, classes)
    return RunData(
        config,
        problem,
        device,
        classes,
        train=train.to(device),
        heldout=heldout.to(device),
        test=test.to(device),
        probe=train[probed].to(device),
        sampler=sampler,
        reader=make_reader(config, train, sampler, world),
        origin=used[order[first:]],
    )


def check_length_of(config: TrainConfig, samples: int) -> None:
    """Refuses micro-batches that hold more than there is."""
    if config.b > samples:
        raise ConfigError(
            f"b must not exceed the training samples; got {config.b} of {samples}. "
            "Lower b or heldout."
        )


def subset(name: str, n: int, limit: int) -> Tensor:
    """The indices used of a data set's n samples: at most `limit`, the same for every seed.

    limit: 0 for all of them, in order.
    """
    if not limit:
        return torch.arange(n)
    return torch.randperm(n, generator=generator(0, name, "limit"))[:limit]


def part_of(problem: Problem, part: Part, used: Tensor, limit: int) -> Samples:
    """The samples `used` of a part; without a limit, they are not copied."""
    if isinstance(part, tuple):
        x, y = part
        if limit:
            x, y = rows_of(x, used), rows_of(y, used)
        return Samples(x, y, y)
    items = Items(part, used, problem.collate, problem.read_ahead)
    known = None if problem.classes == 0 else items.all_targets()
    return Samples(items, known, known)


def count_classes(problem: Problem, train: Samples, test: Samples, limit: int) -> int:
    """How many classes the targets have; 0 if they are no classes.

    Of a Dataset under a limit only those of the samples that are used are known.
    """
    if problem.classes is not None:
        return problem.classes
    labels: list[Tensor] = []
    for part, used in ((problem.train, train), (problem.test, test)):
        y = part[1] if isinstance(part, tuple) else used.observed
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.dim() != 1 or int(y.min()) < 0:
            return 0
        labels.append(y)
    partly_known = limit > 0 and not isinstance(problem.train, tuple)
    # a loss of the task's own may take whole numbers for what they are: gaps are no fault then
    if partly_known or problem.loss is not None:
        return max(int(y.max()) for y in labels) + 1
    return count_by_labels(labels[0], labels[1])


def with_noise(config: TrainConfig, problem: Problem, train: Samples, classes: int) -> Samples:
    """The samples with wrong labels, as the config asks for them."""
    y = train.observed
    if config.noise in ("symmetric", "asymmetric"):
        y = flip(config, train.labels, classes, problem.superclasses)
    return Samples(train.x, y, train.clean)


def flip(config: TrainConfig, y: Tensor, classes: int, superclasses: Tensor | None) -> Tensor:
    if config.noise == "symmetric":
        return noise.symmetric(y, config.noise_rate, classes, config.seed)[0]
    return noise.asymmetric(y, config.noise_rate, classes, config.seed, superclasses)[0]


def make_sampler(config: TrainConfig, train: Samples, classes: int) -> Sampler:
    if config.sampler == "iid":
        return Iid(len(train), config.b, config.seed)
    if config.sampler == "sharded":
        wrong = (train.labels != train.truth).reshape(len(train), -1).any(1)
        return Sharded(wrong, config.k, config.b, config.seed)
    labels = train.labels if config.sampler == "stratified-observed" else train.truth
    return Stratified(labels, classes, config.b, config.seed)


def make_reader(config: TrainConfig, train: Samples, sampler: Sampler, world: int) -> Reader | None:
    """Each of `world` ranks computes one micro-batch of a step: it reads every world-th."""
    if not isinstance(train.x, Items) or not train.x.ahead:
        return None
    return Reader(MicroBatches(train.x, sampler, config.seed, config.k), stride=world)
