"""Every data set is as published, from its real file if that is at hand; faults are reported."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaf_lab.data import sources
from gaf_lab.data.dataset import DataSet, describe_dataset, moments
from gaf_lab.data.generated import white_noise
from gaf_lab.data.sets import LOADERS, load_dataset
from gaf_lab.data.sources import DataError
from helpers import fakes

HUMAN = sources.HUMAN_LABELS.file


@pytest.fixture(scope="module")
def cifar100n(real: Path) -> DataSet:
    return load_dataset("cifar100n", real)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a small CIFAR-100 and human labels."""
    contents = fakes.cifar100()
    fakes.trust(monkeypatch, "CIFAR100", contents)
    fakes.pack(tmp_path, sources.CIFAR100, contents)
    fakes.save_human(tmp_path)
    return tmp_path


def write(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> None:
    """The small CIFAR-100, published with these entries in its training set."""
    contents = fakes.cifar100(**changes)
    fakes.trust(monkeypatch, "CIFAR100", contents)
    fakes.pack(folder, sources.CIFAR100, contents)


def assert_sound(
    read: DataSet, shape: tuple[int, ...], train: int, test: int, classes: int
) -> None:
    assert (read.train_x.shape, read.test_x.shape) == ((train, *shape), (test, *shape))
    assert (read.train_x.dtype, read.test_x.dtype) == (torch.uint8, torch.uint8)
    for y, n in ((read.train_y, train), (read.test_y, test)):
        assert (y.dtype, y.shape) == (torch.int64, (n,))
        assert set(y.tolist()) == set(range(classes))
    assert len(read.mean) == len(read.std) == shape[0]
    assert read.classes == classes
    measured = torch.tensor(moments(read.train_x))
    assert torch.allclose(
        measured, torch.tensor([read.mean, read.std], dtype=measured.dtype), atol=5e-4
    )


# Data that come with packages


def test_digits_are_scikit_learns_in_two_parts() -> None:
    read = load_dataset("digits")
    assert_sound(read, (1, 8, 8), 1438, 359, 10)
    from sklearn.datasets import load_digits

    both = torch.cat([read.train_x, read.test_x]).flatten(1)
    original = torch.from_numpy(load_digits().images).flatten(1)
    assert torch.equal(
        (both * (16 / 255)).round().long().unique(dim=0), original.long().unique(dim=0)
    )
    assert int(both.max()) == 255


def test_mnist5k_is_mlxtends_in_two_balanced_parts() -> None:
    read = load_dataset("mnist5k")
    assert_sound(read, (1, 28, 28), 4000, 1000, 10)
    assert torch.bincount(read.train_y).tolist() == [400] * 10
    assert torch.bincount(read.test_y).tolist() == [100] * 10
    both = torch.cat([read.train_x, read.test_x]).flatten(1)
    assert len(both.unique(dim=0)) == 5000


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_the_split_is_the_same_each_time(name: str) -> None:
    first, second = load_dataset(name), load_dataset(name)
    assert torch.equal(first.test_x, second.test_x)
    assert torch.equal(first.train_y, second.train_y)


# CIFAR-100, the real one


def test_cifar100n_is_what_its_publishers_say(cifar100n: DataSet) -> None:
    assert_sound(cifar100n, (3, 32, 32), 50_000, 10_000, 100)
    assert torch.bincount(cifar100n.train_y).tolist() == [500] * 100
    assert cifar100n.coarse is not None
    assert torch.bincount(cifar100n.coarse).tolist() == [5] * 20
    assert cifar100n.human is not None
    assert (cifar100n.human != cifar100n.train_y).double().mean().item() == pytest.approx(
        0.4020, abs=5e-5
    )


def test_the_coarse_human_labels_are_the_super_classes_of_the_fine_ones(
    cifar100n: DataSet, real: Path
) -> None:
    read = load_dataset("cifar100n-coarse", real)
    assert cifar100n.coarse is not None
    assert cifar100n.human is not None
    assert read.human is not None
    assert torch.equal(read.train_y, cifar100n.coarse[cifar100n.train_y])
    assert torch.equal(read.test_y, cifar100n.coarse[cifar100n.test_y])
    assert torch.equal(read.human, cifar100n.coarse[cifar100n.human])
    assert torch.equal(read.train_x, cifar100n.train_x)
    assert (read.classes, read.coarse) == (20, None)


def test_describe_says_what_is_in_it(cifar100n: DataSet) -> None:
    assert describe_dataset(cifar100n) == {
        "name": "cifar100n",
        "pictures": "3 x 32 x 32",
        "classes": "100",
        "super-classes": "20",
        "training samples": "50000, 500 per class",
        "test samples": "10000, 100 per class",
        "mean": "0.5071, 0.4867, 0.4408",
        "standard deviation": "0.2675, 0.2565, 0.2761",
        "human labels": "40.20% differ from the clean ones",
    }


# CIFAR, small and made up


def test_cifar100_lays_the_planes_out_as_red_green_blue(fake: Path) -> None:
    read = load_dataset("cifar100", fake)
    rows = torch.from_numpy(fakes.rows(200))
    assert torch.equal(read.train_x[7, 1, 2], rows[7, 1024 + 64 : 1024 + 96])
    assert read.human is None
    assert read.coarse is not None
    assert read.coarse.tolist() == [c % 20 for c in range(100)]


@pytest.mark.parametrize("name", ["cifar100n", "cifar100n-coarse"])
def test_the_human_labels_are_found_beside_the_unpacked_folder(name: str, fake: Path) -> None:
    root = fakes.unpack(fake, sources.CIFAR100, fakes.cifar100())
    read = load_dataset(name, root)
    assert read.human is not None
    assert (read.human != read.train_y).sum() == 50


def test_cifar10_is_its_five_batches_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contents = fakes.cifar10()
    fakes.pack(tmp_path, fakes.trust(monkeypatch, "CIFAR10", contents), contents)
    read = load_dataset("cifar10", tmp_path)
    assert read.train_y.tolist() == list(range(10)) * 5
    assert torch.equal(
        read.train_x, torch.from_numpy(fakes.rows(10)).view(-1, 3, 32, 32).repeat(5, 1, 1, 1)
    )
    assert (len(read.test_y), read.classes) == (10, 10)


def test_a_label_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(monkeypatch, tmp_path, fine_labels=[100] + [i % 100 for i in range(1, 200)])
    with pytest.raises(
        DataError,
        match=r"^cifar100: train labels must lie in \[0, 100\); got 0 to 100\. "
        r"Is it the file of another data set\?",
    ):
        load_dataset("cifar100", tmp_path)
    write(monkeypatch, tmp_path, coarse_labels=[-1] * 200)
    with pytest.raises(DataError, match=r"coarse train labels must lie in \[0, 20\); got -1 to -1"):
        load_dataset("cifar100", tmp_path)


def test_a_human_label_out_of_range_is_refused(fake: Path) -> None:
    fakes.save_human(fake, noisy_label=np.full(200, 100))
    with pytest.raises(
        DataError, match=r"human labels in .*human\.pt must lie in \[0, 100\); got 100 to 100"
    ):
        load_dataset("cifar100n", fake)


def test_human_labels_of_other_pictures_are_refused(fake: Path) -> None:
    fakes.save_human(fake, clean_label=(np.arange(200) + 1) % 100)
    with pytest.raises(
        DataError,
        match=r"human\.pt: its clean labels must be those of CIFAR-100 in the same order; "
        "they are not",
    ):
        load_dataset("cifar100n", fake)


def test_too_few_human_labels_are_refused(fake: Path) -> None:
    fakes.save_human(fake, noisy_label=np.zeros(199, np.int64))
    with pytest.raises(DataError, match=r"there must be 200 human labels; got 199"):
        load_dataset("cifar100n", fake)


def test_missing_human_labels_say_where_they_come_from(fake: Path) -> None:
    (fake / HUMAN).unlink()
    with pytest.raises(
        DataError,
        match=rf"must hold {HUMAN}; it does not\. "
        rf"Download https://.*\(md5 {sources.HUMAN_LABELS.md5}\) into {fake}",
    ):
        load_dataset("cifar100n", fake)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": fakes.rows(199)},
            r"every train picture must have a label; got 199 pictures and 200 labels",
        ),
        (
            {"data": fakes.rows(200).astype(np.int64)},
            r"train: 'data' must be uint8 of shape \(N, 3072\); got int64 of shape \(200, 3072\)",
        ),
        ({"data": [1, 2]}, r"'data' must be uint8 of shape \(N, 3072\); got list"),
        (
            {"fine_labels": [0.5] * 200},
            r"train: 'fine_labels' must be a list of whole numbers; it is not",
        ),
        ({"fine_labels": ["a"] * 200}, r"'fine_labels' must be a list of whole numbers; it is not"),
        ({"fine_labels": None}, r"'fine_labels' must be a list of whole numbers; it is not"),
        (
            {"fine_labels": [0] * 200},
            r"every class must lie in one super-class; in the training labels one lies in two",
        ),
        (
            {"coarse_labels": [0] * 100},
            r"every train picture must have a coarse label; got 200 fine and 100 coarse labels",
        ),
    ],
)
def test_a_training_set_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(monkeypatch, tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar100", tmp_path)


def test_the_pickle_of_another_data_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contents = fakes.cifar100() | {"train": pickle.dumps({"labels": [1]}, 2)}
    fakes.pack(tmp_path, fakes.trust(monkeypatch, "CIFAR100", contents), contents)
    with pytest.raises(DataError, match=r"cifar100: train: must hold 'data'; got \['labels'\]"):
        load_dataset("cifar100", tmp_path)


# Fashion-MNIST


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Its four files, with 20 pictures to train on and 10 to test."""
    trusted = {}
    for source in sources.FASHION_MNIST:
        n = 20 if source.file.startswith("train") else 10
        shape = (n, 28, 28) if "images" in source.file else (n,)
        content = (
            bytes([0, 0, 8, len(shape)])
            + np.array(shape, ">u4").tobytes()
            + (np.arange(np.prod(shape)) % 10).astype(np.uint8).tobytes()
        )
        (tmp_path / source.file).write_bytes(gzip.compress(content))
        trusted[source] = fakes.md5(content)
    monkeypatch.setattr(sources, "FASHION_MNIST", trusted)
    return tmp_path


def test_fashion_mnist_is_read_from_a_folder_or_from_debians_package(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = load_dataset("fashion-mnist", fashion)
    assert (given_.train_x.shape, given_.test_x.shape) == ((20, 1, 28, 28), (10, 1, 28, 28))
    assert given_.train_y.tolist() == [i % 10 for i in range(20)]
    monkeypatch.setattr(sources, "DEBIAN_FASHION", fashion)
    monkeypatch.setenv("GAF_DATA", str(fashion / "cache"))
    assert torch.equal(load_dataset("fashion-mnist").train_x, given_.train_x)
    assert not (fashion / "cache").exists()


def test_fashion_mnist_in_a_folder_without_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"must hold train-images-idx3-ubyte\.gz; it does not\. Download https://"
    ):
        load_dataset("fashion-mnist", tmp_path)


# The rest


def test_white_noise_is_uniform_and_the_same_for_the_same_seed() -> None:
    read = white_noise(2000, 500, classes=100)
    assert_sound(read, (3, 32, 32), 2000, 500, 100)
    counts = torch.bincount(read.train_x.flatten(), minlength=256).double()
    # 24,000 per value: five deviations are 3.2%
    assert ((counts / counts.mean() - 1).abs() < 0.04).all()
    assert torch.equal(read.test_x, white_noise(2000, 500, classes=100).test_x)
    assert not torch.equal(read.test_x, white_noise(2000, 500, classes=100, seed=1).test_x)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**32))
def test_moments_are_those_of_the_pictures(channels: int, n: int, seed: int) -> None:
    x = torch.randint(
        256, (n, channels, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    mean, std = moments(x)
    direct = x.double().div(255).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), direct.mean(1))
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), direct.std(1, correction=0))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar-100", "cifar100"),
        ("mnist", "mnist5k"),
        ("fashion", "fashion-mnist"),
        ("digit", "digits"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^data: the name must be one of digits, .*; got '{name}'\. "
        rf"Did you mean '{nearest}'\?",
    ):
        load_dataset(name)


@pytest.mark.parametrize("name", ["coco", "svhn", "x"])
def test_a_name_that_is_near_to_none_is_answered_with_all_of_them(name: str) -> None:
    with pytest.raises(ValueError, match=rf"must be one of {', '.join(LOADERS)}; got '{name}'\.$"):
        load_dataset(name)


def test_a_class_without_samples_is_described_as_such() -> None:
    x, y = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 2])
    facts = describe_dataset(DataSet("tiny", x, y, x, y, 3, None, None, (0.0,), (1.0,)))
    assert facts["training samples"] == "3, 0 to 2 per class"
    assert facts["super-classes"] == "none"
    assert "human labels" not in facts
