"""ImageNet's folder: its layout, its pictures, and that reading ahead changes only the time."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gaf_lab.data import jpeg
from gaf_lab.data.dataset import describe_dataset
from gaf_lab.data.files import Chunks, Files, MicroBatches
from gaf_lab.data.generated import make_pictures
from gaf_lab.data.imagenet import find_imagenet
from gaf_lab.data.problem import make_problem
from gaf_lab.data.read_ahead import PREFETCH, Reader, read_ahead, reader_count, worker_died
from gaf_lab.data.sampling import Iid, generator
from gaf_lab.data.sets import load_dataset
from gaf_lab.data.sources import DataError
from gaf_lab.records import run as records
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training import models
from gaf_lab.training.evaluate import logits
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state, wait_until

CPU = torch.device("cpu")
SMALL = TrainConfig(
    dataset="imagenet",
    size=16,
    model="convnet",
    k=2,
    b=6,
    passes=4.0,
    eval_every=2.0,
    augment=True,
    tau=1.0,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """4 classes, 24 training and 6 test pictures of each, 20 to 30 pixels on a side."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), classes=4, per_class=24, size=20)


def save(path, pixels, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def random_pixels(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# What is found


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


def test_labels_are_flipped_split_and_limited_as_those_of_other_sets(pictures):
    problem = make_problem(
        dataclasses.replace(SMALL, limit=80, heldout=0.25, noise_rate=0.5), pictures, CPU
    )
    parts = problem.train, problem.heldout
    assert [len(part) for part in parts] == [60, 20]
    assert len(set(np.concatenate([part.x.names for part in parts]).tolist())) == 80
    assert sum(int((part.observed != part.clean).sum()) for part in parts) == 40
    for part in (*parts, problem.test, problem.probe):  # the class is the name of the folder
        assert part.clean.tolist() == [int(name.split(b"/")[0][1:]) for name in part.x.names]
    assert len(problem.test) == 24
    assert torch.equal(problem.test.observed, problem.test.clean)


# From a file to a picture


def test_grey_and_cmyk_pictures_and_those_with_another_files_suffix_become_rgb(tmp_path):
    smooth = np.broadcast_to(
        np.linspace(40, 200, 16, dtype=np.uint8)[None, :, None], (16, 16, 3)
    ).copy()
    paths = [
        save(tmp_path / "rgb.JPEG", smooth, quality=95),
        save(tmp_path / "grey.JPEG", smooth, "L", quality=95),
        save(tmp_path / "cmyk.JPEG", smooth, "CMYK", quality=95),
        save(tmp_path / "alpha.JPEG", smooth, "RGBA", format="PNG"),
    ]
    for path in paths:
        image = jpeg.decode(path)
        assert image.mode == "RGB"
        # what JPEG loses of a slope at quality 95
        assert np.abs(np.asarray(image).astype(int) - smooth).max() <= 4, path


@pytest.mark.parametrize("damage", ["cut off", "text", "empty", "gone"])
def test_a_file_that_is_no_whole_picture_is_named(tmp_path, damage):
    path = save(tmp_path / "n01_1.JPEG", random_pixels(32, 32))
    content = {"cut off": path.read_bytes()[:-200], "text": b"not a picture", "empty": b""}
    path.write_bytes(content[damage]) if damage in content else path.unlink()
    with pytest.raises(
        DataError,
        match=f"{path} must be a whole JPEG or PNG file; it cannot be read .*. Unpack it again.",
    ):
        jpeg.decode(path)


def test_a_test_picture_is_the_middle_of_what_has_256_pixels_on_its_shorter_side():
    pixels = random_pixels(256, 356)
    found = jpeg.crop(Image.fromarray(pixels), 224, None)
    assert torch.equal(found, torch.from_numpy(pixels[16:240, 66:290]).permute(2, 0, 1))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**31))
def test_random_crops_lie_in_the_picture_with_area_and_ratio_in_their_ranges(width, height, seed):
    tries = jpeg.draw_crops(1, generator(seed))[0, :-1].tolist()
    left, top, right, bottom = jpeg.random_box(width, height, tries)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = right - left, bottom - top
    # rounding moves each side by half a pixel at most
    assert (across - 0.5) / (down + 0.5) <= 4 / 3 + 1e-9
    assert (across + 0.5) / (down - 0.5) >= 3 / 4 - 1e-9
    if 3 / 4 <= width / height <= 4 / 3:  # of a longer picture there may be no such crop
        assert (across + 0.5) * (down + 0.5) >= 0.08 * width * height


def test_a_random_crop_is_the_one_that_its_numbers_stand_for():
    pixels = random_pixels(64, 64)
    # of the range of areas, for a quarter of the picture; 0.5 for as wide as high
    share = (0.25 - 0.08) / 0.92
    draw = torch.zeros(jpeg.CROP_TRIES + 1, 4, dtype=torch.float64)
    draw[0] = torch.tensor([share, 0.5, 10 / 33, 32.9 / 33])
    draw[-1, 0] = 0.7
    plain = jpeg.crop(Image.fromarray(pixels), 32, draw)
    assert torch.equal(plain, torch.from_numpy(pixels[32:64, 10:42]).permute(2, 0, 1))
    draw[-1, 0] = 0.3
    assert torch.equal(jpeg.crop(Image.fromarray(pixels), 32, draw), plain.flip(2))


def test_where_no_try_fits_the_crop_is_the_largest_in_the_middle():
    wide = [[0.999, 0.5, 0.0, 0.0]] * jpeg.CROP_TRIES  # nearly the whole area as a square
    assert jpeg.random_box(400, 100, wide) == pytest.approx(
        (400 / 2 - 200 / 3, 0, 400 / 2 + 200 / 3, 100)
    )
    assert jpeg.random_box(100, 400, wide) == pytest.approx(
        (0, 400 / 2 - 200 / 3, 100, 400 / 2 + 200 / 3)
    )


# Reading ahead


def micro_batches(folder, size=16, augment=True):
    _, (files, labels), _ = find_imagenet(folder, size)
    return MicroBatches(files, Iid(len(labels), 6, seed=3), seed=3, k=2, augment=augment)


@pytest.mark.parametrize("sampler", ["iid", "stratified-observed"])
def test_a_micro_batch_depends_on_seed_step_and_i_alone(pictures, sampler):
    config = dataclasses.replace(SMALL, sampler=sampler, b=8)
    one, other = (make_problem(config, pictures, CPU) for _ in range(2))
    positions = [(0, 0), (0, 1), (1, 0), (7, 1), (8, 0), (3, 1), (0, 0)]
    for step, i in positions:
        x, y = one.micro_batch(step, i)
        index = one.index(step, i)
        # in this process
        expected = one.train.x.read(index.tolist(), generator(config.seed, "augment", step, i))
        assert torch.equal(x, one.inputs(expected))
        assert torch.equal(y, one.train.observed[index])
    for step, i in reversed(positions):
        assert torch.equal(other.pictures(step, i), one.pictures(step, i))
    assert not torch.equal(
        make_problem(dataclasses.replace(config, seed=1), pictures, CPU).pictures(0, 0),
        other.pictures(0, 0),
    )


def pids():
    return {process.pid for process in multiprocessing.active_children()}


def test_each_rank_reads_its_own_micro_batches_of_the_same_run_ahead(pictures):
    alone = make_problem(SMALL, pictures, CPU)
    for rank in range(2):
        problem, before, used = make_problem(SMALL, pictures, CPU, world=2), pids(), set()
        for step in range(3):
            x = problem.pictures(step, rank)
            used |= pids() - before  # without what reads for the other problem
            assert len(used) == reader_count()  # the same workers at every step
            assert torch.equal(x, alone.pictures(step, rank))
            before |= pids() - used


def test_a_jump_starts_new_workers_and_ends_those_before(pictures):
    reader, others = Reader(micro_batches(pictures), stride=1), pids()
    reader(0)
    first = pids() - others
    reader(5)
    second = pids() - others
    assert len(first) == len(second) == reader_count()
    assert not first & second


def test_without_augmentation_training_pictures_are_their_middle(pictures):
    read = micro_batches(pictures, augment=False)
    assert torch.equal(read(0), read.files.read(read.sampler.draw(0).tolist()))


def test_reading_leaves_the_global_random_numbers_alone(pictures):
    before = torch.get_rng_state()
    reader = Reader(micro_batches(pictures), stride=1)
    for number in (0, 1, 9):
        reader(number)
    assert torch.equal(before, torch.get_rng_state())


class Counting:
    """Reads, and counts how often over all processes."""

    def __init__(self, read):
        self.read, self.count = read, multiprocessing.Value("i", 0)

    def __call__(self, number):
        with self.count.get_lock():
            self.count.value += 1
        return self.read(number)


def test_workers_read_ahead_and_stop_there_so_that_pictures_are_never_all_in_memory(
    pictures, monkeypatch
):
    monkeypatch.setattr("gaf_lab.data.read_ahead.reader_count", lambda: 1)
    _, (files, _), _ = find_imagenet(pictures, 16)
    counted = Counting(Chunks(files, 2))
    stream = read_ahead(counted, range(48))
    next(stream)
    bound = 1 + PREFETCH
    wait_until(lambda: counted.count.value >= bound)
    time.sleep(0.3)  # for a worker that does not stop: it reads a chunk in a millisecond
    assert counted.count.value == bound
    for taken, _ in enumerate(stream, 2):
        assert taken <= counted.count.value <= taken + PREFETCH
    assert counted.count.value == taken == 48


@pytest.mark.parametrize("n", [7, 96, 1000])
def test_a_streamed_part_gives_all_its_pictures_in_order(pictures, n):
    problem = make_problem(dataclasses.replace(SMALL, heldout=0.0), pictures, CPU)
    parts = list(problem.train.batches(n))
    assert [len(x) for x in parts[:-1]] == [n] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts), problem.train.x.read(range(96)))


def test_evaluation_sees_each_test_picture_once_by_as_many_at_a_time_as_fit(pictures, monkeypatch):
    monkeypatch.setattr("gaf_lab.training.evaluate.PIXELS", 16 * 16 * 5)  # 5 of the 24 at a time
    problem = make_problem(SMALL, pictures, CPU)
    model = models.make_model("convnet", problem.shape, problem.classes, "cifar")
    scores = logits(model, problem, problem.test)
    whole = model.eval()(problem.inputs(problem.test.x.read(range(24))))
    torch.testing.assert_close(scores, whole)  # float32 sums of other batch sizes


def test_a_damaged_file_ends_a_stream_with_its_name_and_nothing_around_it(tmp_path):
    files = Files(tmp_path, np.array([b"a.JPEG"]), 16)
    (tmp_path / "a.JPEG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"^imagenet: {tmp_path}/a.JPEG must be a whole JPEG"):
        list(files.split(1))


def test_only_a_lost_workers_error_is_told_anew():
    told = worker_died(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert isinstance(told, DataError)
    assert "one did not (DataLoader worker (pid 7) is killed by signal: Killed. )" in str(told)
    other = RuntimeError("out of memory")
    assert worker_died(other) is other


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
    """A run without end as a process, and its workers' pids once it is under way."""
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
        tmp_path,
    ]
    pipes = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
    }
    process = subprocess.Popen([sys.executable, "-m", "gaf_lab", *map(str, words)], **pipes)
    workers: list[int] = []
    while len(workers) < reader_count() and process.poll() is None:
        time.sleep(0.05)
        # by then git, which the header needs, has exited
        workers = read_by(process.pid) if (tmp_path / records.FILE).exists() else []
    yield process, workers
    process.kill()
    process.communicate()


def read_by(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_killed_ends_the_run_with_one_message(endless, tmp_path):
    process, workers = endless
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 2
    assert (
        "gaf train: imagenet: every process that reads pictures must live as long as the run; "
        "one did not (DataLoader worker" in errors
    )
    assert "Traceback" not in errors
    assert records.read(tmp_path).end["status"] == "interrupted"


def test_a_run_that_is_killed_leaves_no_worker_behind(endless):
    process, workers = endless
    process.kill()
    process.wait()
    assert len(workers) == reader_count()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
