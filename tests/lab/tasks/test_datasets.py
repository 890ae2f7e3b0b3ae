"""Tasks whose samples are read when they are needed, and metrics, augmentation and engines."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from gaf_lab import Augmentation, Metric, Problem
from gaf_lab.data.check_arrays import count_by_labels
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.sampling import generator
from gaf_lab.data.sources import DataError
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.loop import Training
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

CPU = torch.device("cpu")


class Words(Dataset):
    """Sequences of 1 to 5 numbers, whose sum is to be predicted."""

    def __init__(self, n):
        self.rows = [torch.arange(1 + i % 5) / 4 + i / n for i in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i], self.rows[i].sum()


class Squares(Dataset):
    """Two classes, with noise that is drawn for each micro-batch."""

    def __init__(self, n):
        self.targets = torch.arange(n) % 2
        self.drawn = []

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.read([i], None)[0][0], int(self.targets[i])

    def read(self, indices, draw):
        y = self.targets[indices]
        x = torch.stack([y.float(), 1 - y.float()], 1)
        if draw is not None:
            self.drawn.append(list(indices))
            x = x + 0.1 * torch.randn(x.shape, generator=draw)
        return x, y


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, x):
        return (self.scale(x["numbers"][..., None])[..., 0] * x["mask"]).sum(1)


def pad(items):
    rows, sums = zip(*items, strict=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
    numbers = nn.utils.rnn.pad_sequence(list(rows), True)
    return {"numbers": numbers, "mask": mask}, torch.stack(sums)


def words(config):
    return Problem(
        model=Masked,
        loss=lambda output, target: (output - target) ** 2,
        train=Words(60),
        test=Words(13),
        collate=pad,
        metric=Metric("negative error", lambda o, t: -(o - t).abs()),
        batch=5,
    )


def squares(config):
    return Problem(model=lambda: nn.Linear(2, 2), train=Squares(64), test=Squares(10))


def doubled(config):
    """Rows of numbers, doubled or not at random."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(80, 3, generator=draw)
    change = Augmentation(
        lambda b, g: torch.randint(1, 3, (b, 1), generator=g), lambda x, times: x * times
    )
    return Problem(
        model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)),
        loss=lambda output, target: (output - target) ** 2,
        train=(x, x.sum(1)),
        test=(x[:9], x[:9].sum(1)),
        augment=change if config.augment else None,
        prepare=lambda x: x / 2,
    )


def by_function(config):
    return dataclasses.replace(doubled(config), augment=lambda x, g: x)


def own(task, **changes):
    usual = {"noise": "none", "k": 2, "b": 4, "passes": 3.0, "eval_every": 1.0, "device": "cpu"}
    reference = {"task": f"{__name__}:{task.__name__}", "lr": 0.01}
    return TrainConfig(**{**usual, **reference, **changes})


def test_items_of_any_length_are_collated_and_judged_by_the_tasks_metric(tmp_path):
    run = train(own(words), tmp_path / "run", Silent())
    assert (run.score.key, run.score.name, run.score.higher) == ("metric", "negative error", True)
    training = Training(own(words), None)
    while training.step < training.problem.steps:
        training.macro_batch()
    x, y = pad([Words(13)[i] for i in range(13)])  # all at once, not 5 at a time
    with torch.no_grad():
        gap = (training.model.eval()(x) - y).double()
    last = run.evals[-1]
    assert last["test_metric"] == pytest.approx(float(-gap.abs().mean()), rel=1e-5)
    assert last["test_loss"] == pytest.approx(float((gap**2).mean()), rel=1e-5)
    assert run.selected["heldout_metric"] == max(line["heldout_metric"] for line in run.evals)


def test_a_dataset_of_classes_is_read_by_micro_batch_and_takes_wrong_labels(tmp_path):
    config = own(squares, noise="symmetric", noise_rate=0.25)
    data = Training(config, None).problem
    assert int((data.train.labels != data.train.truth).sum()) <= 16 == int(0.25 * 64)
    x, y = data.micro_batch(3, 1)
    places = data.train.x.places[data.index(3, 1)].tolist()
    assert data.problem.train.drawn == [places]
    expected, _ = Squares(64).read(places, generator(config.seed, "augment", 3, 1))
    assert torch.equal(x, expected)
    assert torch.equal(y, data.train.labels[data.index(3, 1)])
    whole = train(config, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Stop(after=10))
    train(config, tmp_path / "parts", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    assert whole.evals[-1]["memorised"] is not None


def test_early_stopping_and_averaged_weights_follow_a_loss_that_falls(tmp_path):
    run = train(own(doubled, early_stopping=2, ema=0.5), tmp_path / "run", Silent())
    assert run.evals[-1]["heldout_loss"] == min(line["heldout_loss"] for line in run.evals)
    assert {"own_test_loss", "own_heldout_loss"} <= run.evals[-1].keys()


@pytest.mark.parametrize("augment", [False, True])
def test_the_device_engine_takes_the_steps_of_the_plain_one(tmp_path, augment):
    config = own(doubled, augment=augment, tau=1.0)
    runs = [
        train(dataclasses.replace(config, engine=engine), tmp_path / engine, Silent())
        for engine in ("plain", "device")
    ]
    assert runs[0].rows == runs[1].rows
    assert 0 < sum(runs[0].rows) < 2 * len(runs[0].rows)
    plain, device = (run.evals[-1]["test_loss"] for run in runs)
    assert plain == pytest.approx(device, rel=1e-5)
    drawn = Training(config, None).problem
    x, _ = drawn.micro_batch(0, 0)
    ratio = x / (drawn.train.x[drawn.index(0, 0)] / 2)
    assert set(ratio.round().flatten().tolist()) == ({1.0, 2.0} if augment else {1.0})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (words, "train must be tensors for engine 'device'; the task has a Dataset"),
        (by_function, "augment must be a gaf_lab.Augmentation for engine 'device'"),
    ],
)
def test_what_the_device_engine_cannot_run_is_refused(tmp_path, task, message):
    with pytest.raises(ConfigError, match=f"{message}.* Use --engine plain"):
        train(own(task, engine="device"), tmp_path / "run", Silent())


def twelve(config):
    x, y = torch.randn(60, 3), torch.arange(60) % 12
    return Problem(model=lambda: nn.Linear(3, 12), train=(x, y), test=(x, y))


def test_classes_are_counted_on_all_samples_whatever_the_limit():
    config = own(twelve, k=2, b=2, limit=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_run_data(config, None, CPU).classes == 12


def many(config):
    data = Squares(400)
    data.targets = torch.arange(400) % 100
    return Problem(model=lambda: nn.Linear(2, 100), train=data, test=data)


def test_a_dataset_of_which_a_part_is_used_is_asked_nothing_of_the_rest():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_run_data(own(many, limit=50), None, CPU).classes > 90
        assert make_run_data(own(many), None, CPU).classes == 100


def counts(config):
    x, y = torch.rand(12, 3), 500 * torch.arange(12)
    loss = lambda output, target: (output[:, 0] - target) ** 2  # noqa: E731
    return Problem(model=lambda: nn.Linear(3, 2), train=(x, y), test=(x, y), loss=loss)


def test_whole_numbers_are_more_classes_than_samples_only_without_a_loss_of_ones_own():
    assert make_run_data(own(counts, k=2, b=2), None, CPU).classes == 5501
    labels = 500 * torch.arange(12)
    with pytest.raises(DataError, match="labels must be numbers of classes.* up to 5,500 for 12"):
        count_by_labels(labels, labels)
