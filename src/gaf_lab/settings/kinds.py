"""Types of a config's fields: which values a field takes, and how TOML names and writes them."""

import datetime
import json
from dataclasses import Field
from pathlib import Path
from typing import Any, get_args, get_origin

from gaf_lab.settings.checks import ConfigError, nearest

FIELD_KINDS: dict[Any, tuple[Any, str]] = {  # by a field's type: types of its values, and a name
    int: (int, "an integer"),
    float: ((int, float), "a float"),
    bool: (bool, "a boolean"),
    str: (str, "a string"),
    Path: (Path, "a path, in TOML a string"),
    tuple: (tuple, "an array of floats"),
}
TOML_KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "an array",
    tuple: "an array",
    dict: "a table",
}


def check_type(field: "Field[Any]", value: Any) -> None:
    """Refuses a value that is not of the field's type, or is none of its choices."""
    choices = get_args(field.type)
    if choices and all(isinstance(c, str) for c in choices):
        check_choice(field.name, value, choices)
        return
    if value is None and type(None) in choices:
        return
    known = [k for k in (field.type, get_origin(field.type), *choices) if k in FIELD_KINDS]
    types, words = FIELD_KINDS[known[0]]
    if not is_of_type(value, types):
        seen = name_kind(value)
        raise ConfigError(f"{field.name} must be {words}; got {seen}{write_example(field)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(
            f"{field.name} must fit into 64 bits; got {value:.3g}{write_example(field)}"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        seen = repr(value) if isinstance(value, str) else name_kind(value)
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}; got {seen}.{nearest(str(value), choices)}"
        )


def is_of_type(value: Any, types: Any) -> bool:
    if isinstance(value, bool) and types is not bool:
        return False
    if types is tuple and isinstance(value, tuple):
        return all(is_of_type(one, (int, float)) for one in value)
    return isinstance(value, types)


def write_example(field: "Field[Any]") -> str:
    """How a field is written, shown by its default; a bare full stop without a default."""
    known = field.default is not None and field.default != ""
    return f". It is written as in {field.name} = {as_toml(field.default)}." if known else "."


def as_toml(value: Any) -> str:
    """A value as it stands in a TOML file, shortened to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def name_kind(value: Any) -> str:
    """A value after TOML's name for its type; the value alone if TOML has no such type."""
    if type(value) in TOML_KINDS:
        return f"{TOML_KINDS[type(value)]}, {as_toml(value)}"
    if isinstance(value, datetime.date | datetime.time):
        return f"a date or time, {value}"
    return repr(value)
