"""Warnings of gaf on the console: their words alone, without a place in gaf's own code."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, a warning that begins with "gaf: " is one line; others are shown as ever."""
    usual = warnings.formatwarning

    def words_of(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if str(message).startswith("gaf: "):
            return f"{message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = words_of
    try:
        yield
    finally:
        warnings.formatwarning = usual
