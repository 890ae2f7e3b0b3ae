"""Checks the options that an adapter passes on to `gaf.Accumulator` or `gaf.attach`."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from gaf.device.accumulate import Accumulator
from gaf.ranks.attach import attach

# what an adapter fills in itself, and what a framework decides: when a macro-batch ends
GIVEN = ("optimizer", "policy", "model", "scaler", "until")


def option_names(call: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name not in GIVEN]


ONE_PROCESS, SEVERAL = option_names(Accumulator), option_names(attach)


def check_names(options: Mapping[str, Any], subject: str) -> None:
    """Refuses unknown options, before it is known whether micro-batches or ranks are the rows."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"{subject}: options must be a dictionary of names and values; got {options!r}. "
            'Use {"bn": "accepted"}, say.'
        )
    if "until" in options:
        raise TypeError(
            f"{subject}: until must be left out, because the framework fixes how many "
            f"micro-batches make a step; got {options['until']!r}. "
            "Use gaf.Accumulator(..., until=...) in a loop of your own."
        )
    for name in options:
        if name not in (*ONE_PROCESS, *SEVERAL):
            raise TypeError(
                f"{subject}: an option must be one of gaf.Accumulator's in one process "
                f"({', '.join(ONE_PROCESS)}) or of gaf.attach's in several "
                f"({', '.join(SEVERAL)}); got {name!r}. Leave it out."
            )


def check_options(options: Mapping[str, Any], subject: str, *, ranks: bool) -> None:
    """Refuses options that the rows at hand do not have.

    Args:
        options: what a user gave, by name.
        subject: the adapter's name, for messages.
        ranks: whether the rows are ranks, by `gaf.attach`, or micro-batches, by `gaf.Accumulator`.

    Raises:
        TypeError: for an unknown option, or one that only the other call has.
    """
    check_names(options, subject)
    for name in options:
        if ranks and name not in SEVERAL:
            raise TypeError(
                f"{subject}: where ranks are the rows, an option must be one of gaf.attach's "
                f"({', '.join(SEVERAL)}); got {name!r}, which gaf.Accumulator has. "
                "Leave it out, or train on one device."
            )
        if not ranks and name not in ONE_PROCESS:
            raise TypeError(
                f"{subject}: where micro-batches are the rows, in one process, an option must be "
                f"one of gaf.Accumulator's ({', '.join(ONE_PROCESS)}); got {name!r}, which "
                "gaf.attach has. Leave it out, or start several processes."
            )


def check_b(b: Any, subject: str) -> float:
    """Samples per row, > 0."""
    if not isinstance(b, Real) or not 0 < float(b) < math.inf:
        raise ValueError(
            f"{subject}: b must be a number of samples per row, above 0; got {b!r}. "
            "Leave it out to count rows."
        )
    return float(b)
