"""What `GAF` takes as tau and as max_norm_ratio."""

from typing import Any

from torch import Tensor

from gaf.arguments import is_number, plain_number
from gaf.rules.thresholds import MovingAverageTau, Threshold


def as_tau(tau: Any) -> float | Threshold:
    """What GAF takes as tau, as one of Python's numbers or a threshold object."""
    if isinstance(tau, Threshold):
        return tau
    if isinstance(tau, str) and tau == "auto":
        return automatic_tau()
    if not is_number(tau) or not 0 <= tau <= 2:
        raise ValueError(
            "GAF: tau is a cosine distance and must lie in [0, 2], or be a threshold object or "
            f"'auto'; got {tau!r}. {way_to_tau(tau)}"
        )
    return plain_number(tau)


def way_to_tau(given: Any) -> str:
    """What to give in place of a tau that cannot be used."""
    if isinstance(given, type) and issubclass(given, Threshold):
        return f"Call it: gaf.{given.__name__}()."
    if isinstance(given, Tensor):
        return "Give tau.item()."
    return "The paper uses 0.97; 2 accepts everything."


def automatic_tau() -> Threshold:
    """The threshold that tau="auto" stands for, a new one."""
    return MovingAverageTau(0.05)


def as_norm_ratio(ratio: Any) -> float:
    if not is_number(ratio) or not ratio >= 1:
        raise ValueError(
            f"GAF: max_norm_ratio must be None or a number of at least 1; got {ratio!r}. "
            "10 lets ordinary rows pass."
        )
    return plain_number(ratio)


def check_scope_and_tau(scope: str, tau: float | Threshold) -> None:
    if scope != "all" and isinstance(tau, Threshold):
        raise ValueError(
            f"GAF: with scope {scope!r} tau must be a number, because a threshold object "
            f"follows one decision per step; got {tau!r}. Use scope='all'."
        )
