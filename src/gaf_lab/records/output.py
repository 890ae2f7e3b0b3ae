"""Where results are written: folders and files that can be, and files that appear whole."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gaf_lab.settings.checks import ConfigError


def make_folder(folder: Path) -> None:
    """Makes an output folder; ConfigError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try the same folder
    except FileExistsError:
        raise ConfigError(
            f"output folder {folder}: must be a folder; it is a file. Give another one with --out."
        ) from None
    except OSError as error:
        seen = f"it is not ({error.filename}: {error.strerror})"
        raise ConfigError(
            f"output folder {folder}: must be writable; {seen}. Give another one with --out."
        ) from None


def make_file(path: Path) -> None:
    """Makes the folder of an output file; ConfigError if the file cannot be written there."""
    if path.is_dir():
        raise ConfigError(
            f"output file {path}: must be a file; it is a folder. "
            "Give a file's name in it with --out."
        )
    make_folder(path.parent)


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """A temporary path, which replaces the file at the end; an error leaves the old file."""
    part = path.with_name(f".part-{path.name}")  # the suffix stays: it names a picture's format
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
