"""Code of the user's own, such as a task: whether it can be called, and where it raised."""

import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def misfit(function: Callable[..., Any], count: int, *names: str) -> str:
    """The function as it is defined, if it cannot be called so; else empty.

    count: of the arguments by position.
    names: of those by name.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # not written in Python
        return ""
    try:
        signature.bind(*[None] * count, **dict.fromkeys(names))
    except TypeError:
        return f"{getattr(function, '__name__', type(function).__name__)}{signature}"
    return ""


def own_place(error: Exception) -> str:
    """ " (FILE, line N)" of the last line of the user's own in the error's path; else empty."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if not is_installed(line.filename)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def own_part(error: Exception) -> str:
    """Traceback and message of an error, from the first line of the user's own on; else empty."""
    if isinstance(error, SyntaxError) and error.filename and not is_installed(error.filename):
        return "".join(traceback.format_exception_only(error))
    found = traceback.TracebackException.from_exception(error)
    own = [i for i, line in enumerate(found.stack) if not is_installed(line.filename)]
    if not own:
        return ""
    found.stack = traceback.StackSummary.from_list(found.stack[own[0] :])
    return "".join(found.format())


def is_installed(file: str) -> bool:
    """Whether a file of code is part of Python, a package, or gaf."""
    places = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    path, roots = Path(file), (Path(__file__).parents[1], *map(Path, places))
    packages = {"site-packages", "dist-packages"}
    known = packages & {*path.parts} or any(path.is_relative_to(root) for root in roots)
    return bool(known) or file.startswith("<")
