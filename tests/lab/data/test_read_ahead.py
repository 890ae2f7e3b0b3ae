"""Reading ahead changes only the time."""

import dataclasses
import multiprocessing
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from gaf_lab.data.files import Files, LabelledFiles
from gaf_lab.data.imagenet import find_imagenet
from gaf_lab.data.items import Chunks, Items, MicroBatches
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.read_ahead import (
    PREFETCH,
    Reader,
    has_lost_worker,
    read_ahead,
    reader_count,
    worker_died,
)
from gaf_lab.data.sampling import Iid, generator
from gaf_lab.data.sources import DataError
from gaf_lab.training.evaluate import logits
from helpers.pictures import CPU, SMALL
from helpers.runs import wait_until


def micro_batches(folder, size=16, augment=True):
    read = items(folder, size, augment)
    return MicroBatches(read, Iid(len(read), 6, seed=3), seed=3, k=2)


def items(folder, size=16, augment=True):
    _, (files, labels), _ = find_imagenet(folder, size)
    every = torch.arange(len(labels))
    return Items(LabelledFiles(files, labels, augment), every, default_collate, ahead=True)


@pytest.mark.parametrize("sampler", ["iid", "stratified-observed"])
def test_a_micro_batch_depends_on_seed_step_and_i_alone(pictures, sampler):
    config = dataclasses.replace(SMALL, sampler=sampler, b=8)
    one, other = (make_run_data(config, pictures, CPU) for _ in range(2))
    positions = [(0, 0), (0, 1), (1, 0), (7, 1), (8, 0), (3, 1), (0, 0)]
    for step, i in positions:
        x, y = one.micro_batch(step, i)
        index = one.index(step, i)
        # in this process
        draw = generator(config.seed, "augment", step, i)
        expected, _ = one.train.x.read(index.tolist(), draw)
        assert torch.equal(x, one.inputs(expected))
        assert torch.equal(y, one.train.observed[index])
    for step, i in reversed(positions):
        assert torch.equal(other.samples(step, i)[0], one.samples(step, i)[0])
    assert not torch.equal(
        make_run_data(dataclasses.replace(config, seed=1), pictures, CPU).samples(0, 0)[0],
        other.samples(0, 0)[0],
    )


def pids():
    return {process.pid for process in multiprocessing.active_children()}


def test_each_rank_reads_its_own_micro_batches_of_the_same_run_ahead(pictures):
    alone = make_run_data(SMALL, pictures, CPU)
    for rank in range(2):
        problem, before, used = make_run_data(SMALL, pictures, CPU, world=2), pids(), set()
        for step in range(3):
            x, _ = problem.samples(step, rank)
            used |= pids() - before  # without what reads for the other problem
            assert len(used) == reader_count()  # the same workers at every step
            assert torch.equal(x, alone.samples(step, rank)[0])
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
    assert torch.equal(read(0)[0], read.items.read(read.sampler.draw(0).tolist())[0])


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
    counted = Counting(Chunks(items(pictures), 2))
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
    problem = make_run_data(dataclasses.replace(SMALL, heldout=0.0), pictures, CPU)
    parts = [x for x, _ in problem.train.batches(n, CPU)]
    assert [len(x) for x in parts[:-1]] == [n] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts), problem.train.x.read(range(96))[0])


def test_evaluation_sees_each_test_picture_once_by_as_many_at_a_time_as_fit(pictures, monkeypatch):
    monkeypatch.setattr("gaf_lab.tasks.pictures.PIXELS", 16 * 16 * 5)  # 5 of the 24 at a time
    problem = make_run_data(SMALL, pictures, CPU)
    model = problem.new_model()
    scores = logits(model, problem, problem.test)
    whole = model.eval()(problem.inputs(problem.test.x.read(range(24))[0]))
    torch.testing.assert_close(scores, whole)  # float32 sums of other batch sizes


def test_a_damaged_file_ends_a_stream_with_its_name_and_nothing_around_it(tmp_path):
    files = Files(tmp_path, np.array([b"a.JPEG"]), 16)
    (tmp_path / "a.JPEG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"^imagenet: {tmp_path}/a.JPEG must be a whole JPEG"):
        list(
            Items(LabelledFiles(files, torch.zeros(1), False), torch.arange(1), list, True).split(1)
        )


def test_only_a_lost_workers_error_is_told_anew():
    told = worker_died(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True
    )
    assert isinstance(told, DataError)
    assert "one did not (DataLoader worker (pid 7) is killed by signal: Killed)." in str(told)
    other = RuntimeError("out of memory")
    assert worker_died(other, False) is other
    told = worker_died(ConnectionResetError("reset"), True)
    assert "one did not (DataLoader worker: reset)" in str(told)
    told = worker_died(EOFError(), True)
    assert "one did not (DataLoader worker: its connection closed)" in str(told)


def later(seconds):
    time.sleep(seconds)
    os._exit(9)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset")])
def test_a_worker_counts_as_lost_whose_connection_closes_just_before_it_ends(error):
    workers = [multiprocessing.Process(target=later, args=(s,), daemon=True) for s in (0.3, 60)]
    for worker in workers:
        worker.start()
    assert workers[0].is_alive()
    assert has_lost_worker(SimpleNamespace(_workers=workers), error)
    assert workers[0].exitcode == 9
    workers[1].kill()
    workers[1].join()


def test_an_error_that_closes_no_connection_waits_for_no_worker():
    worker = multiprocessing.Process(target=later, args=(60,), daemon=True)
    worker.start()
    assert not has_lost_worker(SimpleNamespace(_workers=[worker]), RuntimeError("out of memory"))
    assert worker.is_alive()
    worker.kill()
    worker.join()
