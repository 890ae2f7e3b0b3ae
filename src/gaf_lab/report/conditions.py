"""The conditions of runs: which of them all runs share, and which differ from arm to arm."""

from collections.abc import Iterable
from typing import Any

from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, baseline_of, group_by_point
from gaf_lab.report.fields import NOT_OF_TASKS, has_effect, name_value
from gaf_lab.report.text import NONE

PER_RUN = ("seed", "replay")  # differ from run to run by design

Named = tuple[str, str]  # a condition's name and its value as text


def conditions_of(run: Run) -> dict[str, Any]:
    """Config, versions, machine and commit of a run, by name."""
    config = run.header["config"].items()
    found = {key: name_value(key, value) for key, value in config if key not in PER_RUN}
    for key in ("task", "task_source", *NOT_OF_TASKS):
        if key in found and not has_effect(key, run.header["config"]):
            del found[key]
    for part in ("versions", "machine"):
        inner = run.header.get(part)
        if isinstance(inner, dict):
            found |= inner
        elif inner:
            found[part] = inner
    if run.header.get("commit"):
        found["commit"] = run.header["commit"]
    return found


def values_by_condition(arms: list[Arm]) -> dict[str, list[Any]]:
    """For each condition its value in every run; None where a run does not have it."""
    rows = [conditions_of(run) for arm in arms for run in arm.runs]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def all_equal(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def shared_conditions(arms: list[Arm]) -> dict[str, Any]:
    """The conditions that are the same in all runs."""
    found = values_by_condition(arms)
    return {key: values[0] for key, values in found.items() if all_equal(values)}


def split_conditions(arms: list[Arm]) -> tuple[list[Named], list[tuple[str, list[str]]]]:
    """(name, value) of those that all runs share; (name, value by arm) of the others."""
    shared, differing = [], []
    for key, values in values_by_condition(arms).items():
        name = key.replace("_", " ")
        if not all_equal(values):
            differing.append((name, [values_in(arm, key) for arm in arms]))
        elif values[0] is not None:
            shared.append((name, as_text(values[0])))
    return shared, differing


def values_in(arm: Arm, key: str) -> str:
    """The values of a condition in the arm's runs, each once."""
    texts = dict.fromkeys(as_text(conditions_of(run).get(key)) for run in arm.runs)
    return " / ".join(texts)


def as_text(value: Any) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    return str(value)


def departures(
    arms: list[Arm], differing: list[tuple[str, list[str]]]
) -> list[tuple[str, list[Named]]]:
    """For each method the conditions in which it differs from the baseline of its point.

    By arm instead, for methods whose departures are not the same at all points.
    """
    found = []
    for group in group_by_point(arms):
        base = arms.index(baseline_of(group))
        for arm in group:
            i = arms.index(arm)
            values = [(name, each[i]) for name, each in differing if each[i] != each[base]]
            found.append((arm, values))
    by_method: dict[str, list[list[Named]]] = {}
    for arm, values in found:
        by_method.setdefault(arm.method, []).append(values)
    named = {}
    for arm, values in found:
        named[arm.method if all_equal(by_method[arm.method]) else arm.name] = values
    return list(named.items())


def commands_of(runs: Iterable[Run]) -> list[str]:
    """The commands that made the runs, each once."""
    found = [run.header.get("command") for run in runs]
    texts = [
        " ".join(map(str, command)) if isinstance(command, list) else str(command)
        for command in found
        if command
    ]
    return list(dict.fromkeys(texts))
