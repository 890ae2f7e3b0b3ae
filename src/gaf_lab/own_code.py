"""Where code of the user's own, such as a task, raised or caused an error."""

import sysconfig
import traceback
from pathlib import Path


def own_place(error: Exception) -> str:
    """ " (FILE, line N)" of the last line of the user's own in the error's path; else empty."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if not is_installed(line.filename)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def is_installed(file: str) -> bool:
    """Whether a file of code is part of Python, a package, or gaf."""
    path, roots = Path(file), (Path(__file__).parents[1], Path(sysconfig.get_path("stdlib")))
    known = "site-packages" in path.parts or any(path.is_relative_to(root) for root in roots)
    return known or file.startswith("<")
