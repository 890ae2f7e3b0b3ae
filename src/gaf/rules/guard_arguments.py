"""What `Guard` takes as its arguments."""

import math
from typing import Any, Literal

from gaf.arguments import ABOVE_0, one_of, real_number, whole_number
from gaf.rules.finding import OnAlarm

Spike = Literal["skip", "clip"]


def as_ratio(value: Any) -> float:
    return real_number("Guard: norm_ratio", value, 1, math.inf, "10 is the default.")


def as_deviations(name: str, value: Any, usual: float) -> float:
    """A limit in standard deviations. name: of the argument; usual: a value that is sound."""
    fix = f"It counts standard deviations; {usual:g} is sound."
    return real_number(f"Guard: {name}", value, ABOVE_0, math.inf, fix)


def as_period(value: Any) -> int:
    fix = "4 is the default; 1 looks at every step."
    return whole_number("Guard: cosine_every", value, 1, fix)


def as_spike(value: Spike | None) -> Spike | None:
    if value is not None:
        one_of("Guard: spike", value, ("skip", "clip"))
    return value


def as_on_alarm(value: OnAlarm | None) -> OnAlarm | None:
    if value is not None and not callable(value):
        raise TypeError(
            f"Guard: on_alarm must be None or a function of one dict; got {value!r}. print is one."
        )
    return value
