"""Configs from the outside: a TOML file, or the values in a run's records."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from gaf_lab.settings.checks import ConfigError, nearest
from gaf_lab.settings.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


OWN_TASK: dict[str, Any] = {"noise": "none", "noise_rate": 0.0}  # of a task of the user's own


def from_dict(values: dict[str, Any], base: TrainConfig, source: str) -> TrainConfig:
    """`base` with values from a TOML file or a record. source: its name in messages.

    Raises:
        ConfigError: for an unknown key, with the nearest known one, and for a value that cannot be.
    """
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{source}: unknown key {key!r}.{nearest(key, known)} "
                f"Known keys: {', '.join(known)}."
            )
    if values.get("task"):
        base = base if base.task else dataclasses.replace(base, **OWN_TASK)
    if "task" in values:  # in place of another one, whose source it does not have
        base = dataclasses.replace(base, task="", task_source="")
    converted = {name: convert(value, getattr(base, name)) for name, value in values.items()}
    if isinstance(converted.get("milestones"), list):
        converted["milestones"] = tuple(converted["milestones"])
    if isinstance(converted.get("replay"), str):
        converted["replay"] = Path(converted["replay"])
    try:
        return dataclasses.replace(base, **converted)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def with_task(base: TrainConfig, task: str) -> TrainConfig:
    """`base` with this task, and with clean labels."""
    return dataclasses.replace(base, task=task, task_source="", **OWN_TASK)


def convert(value: Any, default: Any) -> Any:
    """A whole number becomes a float where the default is one; anything else stays."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return float(value) if whole and isinstance(default, float) else value


def from_toml(path: Path, base: TrainConfig) -> TrainConfig:
    source = f"config file {path}"
    values = read_toml(path, source, "Write one with keys as in `gaf train --help`.")
    return from_dict(values, base, source)


def read_toml(path: Path, source: str, fix: str) -> dict[str, Any]:
    """The tables of a TOML file. source: its name in messages; fix: what to do without a file."""
    if path.is_dir():
        raise ConfigError(f"{source}: must be a file; it is a folder. {fix}")
    if not path.exists():
        raise ConfigError(f"{source}: must exist; it does not. {fix}")
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{source}: must be readable; it is not ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: must be UTF-8, as TOML is; byte {error.start + 1} is not. Save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: must be TOML; {error}.") from None
