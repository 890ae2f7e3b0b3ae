"""ImageNet's folder: its layout, and runs on it."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gaf_lab.data.dataset import describe_dataset
from gaf_lab.data.generated import make_pictures
from gaf_lab.data.imagenet import find_imagenet
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.read_ahead import reader_count
from gaf_lab.data.sets import load_dataset
from gaf_lab.data.sources import DataError
from gaf_lab.records import run as records
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.pictures import CPU, SMALL, random_pixels, save
from helpers.runs import Stop, assert_same, final_state, wait_until
from helpers.warm import WARM


@pytest.mark.parametrize("place", ["", "imagenet", "ILSVRC/Data/CLS-LOC"])
def test_classes_and_files_are_found_in_order_and_whatever_else_lies_there_is_not(tmp_path, place):
    pixels = random_pixels(8, 8)
    for name in (
        "train/n02/b.JPEG",
        "train/n02/a.jpg",
        "train/n01/x.jpeg",
        "train/n01/z.PNG",
        "val/n02/v.JPEG",
    ):
        save(tmp_path / place / name, pixels, format="PNG" if "PNG" in name else "JPEG")
    for name in (
        "train/n01/._x.JPEG",
        "train/n01/list.txt",
        "train/note.txt",
        "train/.cache/x.JPEG",
    ):
        (tmp_path / place / name).parent.mkdir(exist_ok=True)
        (tmp_path / place / name).write_text("")
    classes, (train_files, train_y), (val_files, val_y) = find_imagenet(tmp_path, 224)
    assert classes == ["n01", "n02"]
    assert train_files.names.tolist() == [b"n01/x.jpeg", b"n01/z.PNG", b"n02/a.jpg", b"n02/b.JPEG"]
    assert (train_y.tolist(), val_y.tolist()) == ([0, 0, 1, 1], [1])
    assert val_files.shape == (1, 3, 224, 224)


def test_data_shows_classes_and_counts(pictures):
    facts = describe_dataset(load_dataset("imagenet", pictures))
    assert facts["classes"] == "4"
    assert facts["training samples"] == "96, 24 per class"
    assert facts["test samples"] == "24, 6 per class"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [],
            r"must hold train/<class>/\*.JPEG and val/<class>/\*.JPEG, in itself or in imagenet or "
            ".* give its folder with --data DIR",
        ),
        (["train/n01/a.JPEG"], "it has train, but no val. Put that folder beside it"),
        (["val/n01/a.JPEG"], "it has val, but no train"),
        (
            ["train/a.JPEG", "val/n01/a.JPEG"],
            "train must hold a folder for each class; it holds none. Unpack",
        ),
        (
            ["train/n01/a.JPEG", "val/a.JPEG", "val/b.JPEG"],
            "val must hold .* holds none, and 2 pictures, as downloaded. Move each picture",
        ),
        (["train/n01/a.JPEG", "val/n01/a.JPEG", "val/n02/a.JPEG"], "1 of 2 are not, n02 for one"),
        (
            ["train/n01/a.JPEG", "train/n02/a.txt", "val/n01/a.JPEG"],
            r"train/n02 must hold a picture \(.jpeg, .jpg, .png\); it holds none",
        ),
        (["train/n01/a.JPEG", "val/n01/a.txt"], "val/n01 must hold a picture"),
    ],
)
def test_a_folder_that_is_not_imagenets_is_refused_with_what_it_lacks(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        find_imagenet(tmp_path, 224)


def names(part):
    return part.x.dataset.files.names[part.x.places.numpy()]


def test_labels_are_flipped_split_and_limited_as_those_of_other_sets(pictures):
    problem = make_run_data(
        dataclasses.replace(SMALL, limit=80, heldout=0.25, noise_rate=0.5), pictures, CPU
    )
    parts = problem.train, problem.heldout
    assert [len(part) for part in parts] == [60, 20]
    assert len(set(np.concatenate([names(part) for part in parts]).tolist())) == 80
    assert sum(int((part.observed != part.clean).sum()) for part in parts) == 40
    for part in (*parts, problem.test, problem.probe):  # the class is the name of the folder
        assert part.clean.tolist() == [int(name.split(b"/")[0][1:]) for name in names(part)]
    assert len(problem.test) == 24
    assert torch.equal(problem.test.observed, problem.test.clean)


# Runs


@pytest.mark.parametrize("model", ["convnet", "vit-tiny"])
def test_an_interrupted_run_on_files_ends_bit_for_bit_as_an_undisturbed_one(
    pictures, tmp_path, model
):
    if model == "vit-tiny":
        pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, model=model, lr=0.02)
    whole = train(config, tmp_path / "whole", Silent(), data_folder=pictures)
    steps = whole.evals[-1]["step"]
    assert steps == round(4 * 86 / 12)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", Stop(after=steps // 2 + 3), data_folder=pictures)
    resumed = train(config, tmp_path / "cut", Silent(), data_folder=pictures, resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert [line["test_loss"] for line in whole.evals] == [
        line["test_loss"] for line in resumed.evals
    ]


def test_made_pictures_are_the_same_for_a_seed_and_can_be_told_apart(pictures, tmp_path):
    again = make_pictures(tmp_path / "again", classes=4, per_class=24, size=20)
    paths = sorted(path.relative_to(pictures) for path in pictures.rglob("*.JPEG"))
    assert len(paths) == 4 * (24 + 6)
    assert all((again / path).read_bytes() == (pictures / path).read_bytes() for path in paths)
    config = dataclasses.replace(
        SMALL, policy="mean", noise="none", augment=False, passes=6.0, eval_every=6.0
    )
    run = train(config, tmp_path / "run", Silent(), data_folder=pictures)
    assert run.evals[-1]["test_accuracy"] > 0.75  # a guess gets 0.25


@pytest.fixture
def endless(pictures, tmp_path):
    """A run without end as a process, and its workers' pids once it has started."""
    words = [
        "train",
        "--dataset",
        "imagenet",
        "--data",
        pictures,
        "--size",
        "16",
        "--model",
        "convnet",
        "--k",
        "2",
        "--b",
        "8",
    ]
    words += [
        "--passes",
        "10000",
        "--eval-every",
        "10000",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    ]
    process = WARM.start_program("-m", "gaf_lab", *words, out=tmp_path / "said")
    workers: list[int] = []
    while len(workers) < reader_count() and process.poll() is None:
        time.sleep(0.05)
        # by then git, which the header needs, has exited
        workers = read_by(process.pid) if (tmp_path / "run" / records.FILE).exists() else []
    yield process, workers
    process.kill()
    process.wait()


def read_by(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_killed_ends_the_run_with_one_message(endless, tmp_path):
    process, workers = endless
    os.kill(workers[0], signal.SIGKILL)
    errors = process.finish()
    assert process.returncode == 2, errors
    assert (
        "gaf train: data: every process that reads samples must live as long as the run; "
        "one did not (DataLoader worker" in errors
    )
    assert "Traceback" not in errors
    assert records.read(tmp_path / "run").end["status"] == "interrupted"


def test_a_run_that_is_killed_leaves_no_worker_behind(endless):
    process, workers = endless
    process.kill()
    process.wait()
    assert len(workers) == reader_count()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
