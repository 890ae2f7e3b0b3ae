"""A plan: the configs that a sweep runs, and the name of each one's folder. It comes from a TOML file, a preset or the paper's list.

seeds = [0, 1, 2]            # everything once per seed; 0 without it

[base]                       # keys as in `gaf train --help`
dataset = "cifar100"

[grid]                       # every combination; wins over the base
noise_rate = [0.2, 0.4]

[[arms]]                     # what differs between arms; wins over the grid
policy = "gaf"

[[arms]]
policy = "random-subset"
replay = "GAF"               # the arm of this name, at the same seed and point of the grid
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_lab.settings.config import (
    MOST_RUNS,
    ConfigError,
    TrainConfig,
    check_count,
    from_dict,
    nearest,
    read_toml,
    toml,
)

Configs = list[TrainConfig]
Table = dict[str, Any]
PARTS: dict[str, tuple[type, str]] = {
    "seeds": (list, "a list of different whole numbers, such as [0, 1, 2]"),
    "base": (dict, "a table of config keys, [base]"),
    "grid": (dict, "a table of lists, [grid]"),
    "arms": (list, "tables of config keys, [[arms]]"),
}


def folder_name(config: TrainConfig) -> str:
    """The name of a run's folder, such as "gaf-s0-3f2a90c1d5e7": arm, seed, and the hash by which a finished run is recognised."""
    slug = re.sub("[^a-z0-9]+", "-", config.arm.lower()).strip("-")
    return f"{slug}-s{config.seed}-{config.hash}"


def follow(config: TrainConfig, recorded: TrainConfig) -> TrainConfig:
    """The config, replaying the run of another config of the plan; the sweep runs that one first."""
    return dataclasses.replace(config, replay=Path(folder_name(recorded)))


def from_file(path: Path, seeds: Sequence[int] | None = None) -> Configs:
    """The configs of a TOML file, seed by seed, point by point of the grid, arm by arm. seeds: in place of the file's."""
    source = f"sweep file {path}"
    parts = read_toml(path, source, "docs/sweeps.md has the format.")
    check(parts, source)
    base, arms = parts.get("base", {}), parts.get("arms", [{}])
    count = len(seeds or parts.get("seeds", [0])) * len(arms) * size(parts.get("grid", {}))
    check_count(
        f"{source}: the number of runs", count, 1, MOST_RUNS, "Take values out of the grid."
    )
    return [
        config
        for seed in seeds or parts.get("seeds", [0])
        for point in points(parts.get("grid", {}))
        for config in linked([base | point | arm | {"seed": seed} for arm in arms], arms, source)
    ]


def check(parts: Table, source: str) -> None:
    """Refuses what is no plan; the config keys themselves are looked at where configs are made of them."""

    def require(holds: bool, name: str, requirement: str, seen: Any) -> None:
        if not holds:
            raise ConfigError(
                f"{source}: {name} must be {requirement}; got {toml(seen)}. docs/sweeps.md has an example."
            )

    if not parts:
        raise ConfigError(
            f"{source}: must have a table [base], [grid] or [[arms]]; it is empty. docs/sweeps.md has an example."
        )
    for name, value in parts.items():
        if name not in PARTS:
            raise ConfigError(
                f"{source}: unknown key {name!r}.{nearest(name, PARTS)} Known keys: {', '.join(PARTS)}."
            )
        kind, requirement = PARTS[name]
        require(
            isinstance(value, kind) and (name == "base" or bool(value)), name, requirement, value
        )
    seeds: list[Any] = parts.get("seeds", [])
    grid: Table = parts.get("grid", {})
    arms: list[Any] = parts.get("arms", [])
    require(
        all(type(seed) is int for seed in seeds) and len(set(seeds)) == len(seeds),
        "seeds",
        PARTS["seeds"][1],
        seeds,
    )
    for key, values in grid.items():
        require(
            isinstance(values, list) and len(values) > 0,
            f"{key} in [grid]",
            "a list of values",
            values,
        )
    for arm in arms:
        require(isinstance(arm, dict), "arms", PARTS["arms"][1], arm)
        require(
            isinstance(arm.get("replay", ""), str),
            "replay in [[arms]]",
            "the name of another arm",
            arm.get("replay"),
        )
    if any("seed" in table for table in (parts.get("base", {}), grid, *arms)):
        raise ConfigError(
            f"{source}: seed must stand in the list of seeds, above the tables; it stands in one. Write seeds = [0, 1, 2]."
        )


def size(grid: Table) -> int:
    """How many combinations there are."""
    return math.prod(len(values) for values in grid.values())


def points(grid: dict[str, list[Any]]) -> list[Table]:
    """Every combination of the grid's values, the last key's fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def linked(tables: list[Table], arms: list[Table], source: str) -> Configs:
    """The configs of one seed and point of the grid; an arm's `replay` names another of them until it is linked to its folder."""
    configs = [from_dict(table, TrainConfig(), source) for table in tables]
    waiting = {
        i: position(arm["replay"], configs, source) for i, arm in enumerate(arms) if "replay" in arm
    }
    while waiting:
        ready = [i for i, recorded in waiting.items() if recorded not in waiting]
        if not ready:
            names = ", ".join(repr(configs[i].arm) for i in waiting)
            raise ConfigError(
                f"{source}: replay must lead to an arm that replays none; it goes round among {names}. Change one of them."
            )
        for i in ready:
            configs[i] = follow(configs[i], configs[waiting.pop(i)])
    return configs


def position(name: str, configs: Configs, source: str) -> int:
    """Where the arm of that name is among the configs."""
    names = [config.arm for config in configs]
    if name not in names:
        raise ConfigError(
            f"{source}: replay must name an arm; got {name!r}.{nearest(name, names)} Arms: {', '.join(names)}."
        )
    if names.count(name) > 1:
        raise ConfigError(
            f"{source}: replay must name one arm; {names.count(name)} arms are called {name!r}. Give each its own label."
        )
    return names.index(name)
