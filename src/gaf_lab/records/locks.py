"""Who works in a folder: a lock that the kernel takes back from a process that dies, so that a kill leaves none behind."""

import contextlib
import errno
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError

LOCK = "lock"
# a network file system without locks: there, as before, whoever starts two runs in a folder must know
WITHOUT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class FolderBusy(ConfigError):
    """Another run is at work in the folder."""


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock on a file, which is made where it is missing; waits for whoever holds it."""
    with path.open("a") as file:
        take(file, wait=True)
        yield


def take(file: IO[str], wait: bool) -> bool:
    """Takes the lock on an open file, which ends with the file. False where another one has it, and `wait` is off."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def own_folder(folder: Path, command: str | None = None) -> Iterator[None]:
    """Makes the folder, and keeps every other run out of it meanwhile.

    Args:
        folder: of one run's records, or one command's output.
        command: what those who are kept out are told; None takes this program's own words.

    Raises:
        FolderBusy: where another one is at work in the folder.
        ConfigError: where the folder cannot be written.
    """
    new = not folder.exists()
    records.make_folder(folder)
    with (folder / LOCK).open("a+") as file:
        if not take_if_locks_exist(file):
            file.seek(0)
            raise FolderBusy(
                f"output folder {folder}: must be one run's at a time; {file.read().strip() or 'another run'} is at work in it. "
                "Wait for its end or stop it, or give another one with --out."
            )
        file.truncate(0)
        file.write(f"{command or own_words()} (process {os.getpid()} on {socket.gethostname()}, "
                   f"since {time.strftime('%Y-%m-%d %H:%M:%S')})")  # fmt: skip
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if new and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was begun
                (folder / LOCK).unlink()
                folder.rmdir()


def check_free(folder: Path) -> None:
    """FolderBusy where another run is at work in the folder; a folder that is not there stays so."""
    if (folder / LOCK).is_file():
        with own_folder(folder):
            pass


def take_if_locks_exist(file: IO[str]) -> bool:
    try:
        return take(file, wait=False)
    except OSError as error:
        if error.errno in WITHOUT:
            return True
        raise


def own_words() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
