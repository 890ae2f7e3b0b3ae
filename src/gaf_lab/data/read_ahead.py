"""Worker processes that read samples ahead while the model computes."""

import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gaf_lab.data.sources import DataError
from gaf_lab.settings.cores import cores

PREFETCH = 2  # items that each worker has read and not handed over
MOST_READERS = 16  # worker processes
ENDING = 5.0  # seconds between the closed connection of a worker and its end, at most

Read = Callable[[int], Any]


class Reader:
    """Reads items by number.

    Any number may come first. The numbers that follow it, `stride` apart, have been read ahead.
    """

    def __init__(self, read: Read, stride: int) -> None:
        self._read, self._stride = read, stride
        self._due: int | None = None
        self._stream: Iterator[Any] = iter(())

    def __call__(self, number: int) -> Any:
        if number != self._due:
            self._stream = iter(())  # ends the previous stream's workers first
            self._stream = read_ahead(self._read, itertools.count(number, self._stride))
        self._due = None  # remains so if the reading fails
        found = next(self._stream)
        self._due = number + self._stride
        return found


def read_ahead(read: Read, numbers: Iterable[int]) -> Iterator[Any]:
    """read(n) for each number in order, by worker processes, each at most PREFETCH items ahead.

    Raises:
        DataError: raised by a worker, or because a worker was killed from outside.
    """
    loader: DataLoader[Any] = DataLoader(
        Guarded(read),
        batch_size=None,
        sampler=numbers,
        num_workers=reader_count(),
        prefetch_factor=PREFETCH,
        # The workers' seeds come from this generator, not from torch's global one: a resumed run
        # must find that one unmoved.
        generator=torch.Generator(),
        worker_init_fn=begin_worker,
    )
    stream = iter(loader)
    try:
        for found in stream:
            if isinstance(found, DataError):
                raise found
            yield found
    except (RuntimeError, OSError, EOFError) as error:
        raise worker_died(error, has_lost_worker(stream, error)) from None


class Guarded(Dataset[Any]):
    """Returns a worker's DataError as a value.

    If it were raised there, its message would reach the user wrapped in a traceback.
    """

    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitem__(self, number: int) -> Any:
        try:
            return self._read(number)
        except DataError as error:
            return error


def begin_worker(worker: int) -> None:
    sys.excepthook = report_unless_closed
    exit_with_parent()


def report_unless_closed(kind: Any, error: Any, trace: Any) -> None:
    """Reports an error of the thread that hands samples over, unless the run has hung up.

    A run that ends in between, as where another worker was killed, has its own message.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def exit_with_parent() -> None:
    """Ends this worker as soon as its run has exited.

    The DataLoader itself checks every five seconds, and misses a run that exits before the worker
    is ready. A worker that stays keeps the connections of its rank open, so that the other ranks
    do not notice.
    """
    run = multiprocessing.parent_process()
    assert run is not None

    def exit_after_it() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=exit_after_it, daemon=True).start()


def reader_count() -> int:
    """Worker processes for one rank: one per core of its share, at most MOST_READERS."""
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share, MOST_READERS))


def has_lost_worker(stream: Any, error: Exception) -> bool:
    """Whether a worker of a DataLoader's iterator has ended, as while it handed a sample over.

    The system closes the connections of a process that it ends before anyone can see that the
    process has ended. So after a closed connection this waits until a worker has.
    """
    closed = isinstance(error, ConnectionError | EOFError)
    try:
        ended = wait([w.sentinel for w in stream._workers], ENDING if closed else 0)
        for worker in stream._workers:
            if worker.sentinel in ended:
                worker.join()
    except RuntimeError:  # from the DataLoader's handler of the signal that a worker has ended
        return True
    return bool(ended)


def worker_died(error: Exception, lost: bool = False) -> Exception:
    """What to raise in place of the DataLoader's error: for a killed worker, one with a remedy.

    lost: whether a worker has ended, whatever the error says.
    """
    seen = str(error).split("\n")[0]
    if not seen.startswith("DataLoader worker"):
        if not lost:
            return error
        seen = f"DataLoader worker: {seen or 'its connection closed'}"
    return DataError(
        "data: every process that reads samples must live as long as the run; "
        f"one did not ({seen.rstrip(' .')}). The system ends processes when memory is short: "
        "free some, or lower b, and go on with --resume."
    )
