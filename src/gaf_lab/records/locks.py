"""Locks on folders in use. The kernel releases the lock of a process that dies."""

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

from gaf_lab.records.output import make_folder
from gaf_lab.settings.checks import ConfigError

LOCK = "lock"
# errors of a network file system without locks; there, a second run in a folder is not refused
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class FolderBusy(ConfigError):
    """Another run uses the folder."""


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock on a file, which is made if it is missing; waits for another holder."""
    with path.open("a") as file:
        take_lock(file, wait=True)
        yield


def take_lock(file: IO[str], wait: bool) -> bool:
    """Takes the lock on an open file until it is closed. False if taken and `wait` is off."""
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
    """Makes the folder, and keeps every other run out of it.

    Args:
        folder: of one run's records, or one command's output.
        command: shown to those who are kept out; None takes this program's command line.

    Raises:
        FolderBusy: if another run uses the folder.
        ConfigError: if the folder cannot be written.
    """
    new = not folder.exists()
    make_folder(folder)
    with (folder / LOCK).open("a+") as file:
        if not take_if_locks_exist(file):
            file.seek(0)
            raise FolderBusy(
                f"output folder {folder}: must be one run's at a time; "
                f"{file.read().strip() or 'another run'} is at work in it. "
                "Wait for its end or stop it, or give another one with --out."
            )
        file.truncate(0)
        file.write(
            f"{command or own_command()} (process {os.getpid()} on {socket.gethostname()}, "
            f"since {time.strftime('%Y-%m-%d %H:%M:%S')})"
        )
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if new and [path.name for path in folder.iterdir()] == [LOCK]:  # the run made nothing
                (folder / LOCK).unlink()
                folder.rmdir()


def check_free(folder: Path) -> None:
    """FolderBusy if another run uses the folder. A missing folder is not made."""
    if (folder / LOCK).is_file():
        with own_folder(folder):
            pass


def take_if_locks_exist(file: IO[str]) -> bool:
    try:
        return take_lock(file, wait=False)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        raise


def own_command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
