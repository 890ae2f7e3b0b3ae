"""Checks of single values, and the error that they raise."""

import difflib
from collections.abc import Iterable
from typing import Any

MOST_SEEDS, MOST_RUNS = 1000, 100_000
MOST_WORKERS = 512  # a process with torch takes about 300 MB


class ConfigError(ValueError):
    """A config that cannot run. The message names field, requirement, value and fix."""


def require(config: Any, name: str, holds: bool, requirement: str, fix: str) -> None:
    """ConfigError about a field of the config, unless the requirement holds."""
    if not holds:
        raise ConfigError(f"{name} {requirement}; got {getattr(config, name)!r}. {fix}")


def check_tau(tau: Any) -> None:
    """Refuses the library's "auto", which is a threshold of the lab."""
    if tau == "auto":
        raise ConfigError(
            "tau must be a number; got 'auto'. "
            "For the recommended threshold, which sets tau, use --threshold auto."
        )


def check_count(name: str, value: int, least: int, most: int, fix: str = "") -> None:
    """Refuses a number of things that is too small, or absurdly large."""
    if value < least:
        raise ConfigError(f"{name} must be at least {least}; got {value}.{fix and ' ' + fix}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most:,}; got {value:,}.{fix and ' ' + fix}")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that suggests the nearest known word; empty if no word is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
