"""Numbers that users give: numpy's are as good as Python's, and an error names the argument."""

import math
from numbers import Integral, Real
from typing import Any

ABOVE_0 = math.ulp(0)  # the least value of an argument that must not be 0


def is_number(value: Any) -> bool:
    """Whether this is a real number of Python's or numpy's; no bool and no tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_number(value: Any) -> float:
    """A number as Python's: it prints and compares alike, wherever it came from."""
    return value if type(value) in (int, float) else float(value)


def whole_number(subject: str, value: Any, least: int | None, fix: str) -> int:
    """The value as an int.

    Args:
        subject: whose argument it is and its name, as "Audit: n".
        value: what the user gave.
        least: the smallest that is allowed; None for any.
        fix: a sentence on what to give.

    Raises:
        ValueError: if it is no integer of Python's or numpy's, or too small.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{subject} must be a whole number{bound}; got {value!r}. {fix}")
    return int(value)


def real_number(subject: str, value: Any, low: float, high: float, fix: str) -> float:
    """The value as Python's number.

    Args:
        subject: whose argument it is and its name, as "GAF: tau".
        value: what the user gave.
        low: the least, `ABOVE_0` for any number above 0.
        high: the greatest; infinity itself is never allowed.
        fix: a sentence on what to give.

    Raises:
        ValueError: if it is no number of Python's or numpy's, NaN, or out of its range.
    """
    if not is_number(value) or not low <= value <= high or math.isinf(value):
        least = "above 0" if low == ABOVE_0 else f"of at least {low:g}"
        most = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{subject} must be a number {least}{most}; got {value!r}. {fix}")
    return plain_number(value)


def one_of(subject: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError if the value is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{subject} must be one of {', '.join(map(repr, choices))}; got {value!r}."
        )
