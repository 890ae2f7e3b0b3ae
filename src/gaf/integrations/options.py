"""What an adapter is given for `gaf.Accumulator` or `gaf.attach`, checked in the adapter's own name."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from gaf.device.accumulate import Accumulator
from gaf.ranks.attach import attach

# what an adapter fills in itself
GIVEN = ("optimizer", "policy", "model", "scaler")


def option_names(call: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name not in GIVEN]


ONE_PROCESS, SEVERAL = option_names(Accumulator), option_names(attach)


def check_names(options: Mapping[str, Any], subject: str) -> None:
    """While it is not known yet whether micro-batches or ranks are the rows."""
    if not isinstance(options, Mapping):
        raise TypeError(f"{subject}: options must be a dictionary of names and values; got {options!r}. "
                        'Use {"bn": "accepted"}, say.')  # fmt: skip
    for name in options:
        if name not in (*ONE_PROCESS, *SEVERAL):
            raise TypeError(f"{subject}: an option must be one of gaf.Accumulator's in one process ({', '.join(ONE_PROCESS)}) or of "
                            f"gaf.attach's in several ({', '.join(SEVERAL)}); got {name!r}. Leave it out.")  # fmt: skip


def check_options(options: Mapping[str, Any], subject: str, *, ranks: bool) -> None:
    """
    Args:
        options: by name, what a user gave.
        subject: the adapter, as an error names it.
        ranks: whether the rows are ranks, by `gaf.attach`, or micro-batches, by `gaf.Accumulator`.

    Raises:
        TypeError: for an option that nobody knows, or that only the other one has.
    """
    check_names(options, subject)
    for name in options:
        if ranks and name not in SEVERAL:
            raise TypeError(f"{subject}: where ranks are the rows, an option must be one of gaf.attach's ({', '.join(SEVERAL)}); got "
                            f"{name!r}, which gaf.Accumulator has. Leave it out, or train on one device.")  # fmt: skip
        if not ranks and name not in ONE_PROCESS:
            raise TypeError(f"{subject}: where micro-batches are the rows, in one process, an option must be one of gaf.Accumulator's "
                            f"({', '.join(ONE_PROCESS)}); got {name!r}, which gaf.attach has. Leave it out, or start several "
                            "processes.")  # fmt: skip


def check_b(b: Any, subject: str) -> float:
    """Samples per row, > 0."""
    if not isinstance(b, Real) or not 0 < float(b) < math.inf:
        raise ValueError(f"{subject}: b must be a number of samples per row, above 0; got {b!r}. Leave it out to count rows.")  # fmt: skip
    return float(b)
