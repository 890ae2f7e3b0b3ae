"""Where a task comes from: the file and the function behind `--task`, and a hash of that file.

It does not run the file. `gaf_lab.data.task` does, and calls the function.
"""

import hashlib
import importlib.util
from pathlib import Path

from gaf_lab.settings.checks import ConfigError

HASH_DIGITS = 12  # of a source's hash
FORM = "Write --task module:function, or --task file.py:function."


def split_reference(reference: str) -> tuple[str, str]:
    """The module's name or the file's path, and the function's name."""
    place, _, function = reference.rpartition(":")
    if not place or not function.isidentifier():
        raise ConfigError(
            f"task must name a module or file, a colon, and a function; got {reference!r}. {FORM}"
        )
    return place, function


def is_file(place: str) -> bool:
    return place.endswith(".py")


def locate_task(reference: str) -> tuple[str, str]:
    """The reference, a file's path made absolute; and the hash of the source.

    So another process finds the task from any folder.

    Raises:
        ConfigError: if there is no such module or file.
    """
    place, function = split_reference(reference)
    if is_file(place):
        place = str(Path(place).absolute())
    return f"{place}:{function}", hash_source(source_file(place, reference))


def source_file(place: str, reference: str) -> Path:
    """The file of a task's module, or the file itself."""
    if is_file(place):
        path = Path(place)
        if not path.is_file():
            raise ConfigError(f"task {reference!r}: its file must exist; {path} does not. {FORM}")
        return path
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        beside = Path(f"{place.replace('.', '/')}.py")
        fix = "Put its folder on PYTHONPATH, or give the path of its file."
        if beside.is_file():
            fix = f"Give its file: --task {beside}:{split_reference(reference)[1]}."
        raise ConfigError(f"task {reference!r}: its module must be found; {place!r} is not. {fix}")
    return Path(spec.origin)


def hash_source(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:HASH_DIGITS]


def name_task(reference: str) -> str:
    """The reference as a person reads it: without the folders of a file."""
    place, function = split_reference(reference)
    return f"{Path(place).name if is_file(place) else place}:{function}"
