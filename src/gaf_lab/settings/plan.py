"""A plan: the configs that a sweep runs, and the name of each one's folder; from a TOML file:

seeds = [0, 1, 2]            # everything once per seed; 0 without it

[base]                       # keys as in `gaf train --help`
dataset = "cifar100"

[grid]                       # every combination; wins over the base
noise_rate = [0.2, 0.4]

[[arms]]                     # what differs between arms; wins over the grid
policy = "gaf"

[[arms]]
policy = "random-subset"
replay = "GAF"               # the arm of this name, at the same seed and point of the grid;
                             # for replay-sizes, which would repeat it, at the next seed
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_lab.settings.checks import MOST_RUNS, ConfigError, check_count, nearest
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.kinds import as_toml
from gaf_lab.settings.reading import from_dict, read_toml

Configs = list[TrainConfig]
Table = dict[str, Any]
PARTS: dict[str, tuple[type, str]] = {
    "seeds": (list, "a list of different whole numbers, such as [0, 1, 2]"),
    "base": (dict, "a table of config keys, [base]"),
    "grid": (dict, "a table of lists, [grid]"),
    "arms": (list, "tables of config keys, [[arms]]"),
}


def folder_name(config: TrainConfig) -> str:
    """The name of a run's folder, such as "gaf-s0-3f2a90c1d5e7": arm, seed, and config hash.

    A finished run is recognised by the hash.
    """
    slug = re.sub("[^a-z0-9]+", "-", config.arm.lower()).strip("-")
    return f"{slug}-s{config.seed}-{config.hash}"


def follow(config: TrainConfig, recorded: TrainConfig) -> TrainConfig:
    """The config, set to replay the run of another config, which the sweep runs first."""
    return dataclasses.replace(config, replay=Path(folder_name(recorded)))


def from_file(path: Path, seeds: Sequence[int] | None = None, task: str = "") -> Configs:
    """The configs of a TOML file: by seed, then by point of the grid, then by arm.

    seeds, task: replace the file's.
    """
    source = f"sweep file {path}"
    parts = read_toml(path, source, "docs/sweeps.md has the format.")
    check_plan(parts, source)
    base, grid, arms = parts.get("base", {}), parts.get("grid", {}), parts.get("arms", [{}])
    base = base | {"task": task} if task else base
    seeds = seeds or parts.get("seeds", [0])
    count, name = len(seeds) * len(arms) * grid_size(grid), f"{source}: the number of runs"
    check_count(name, count, 1, MOST_RUNS, "Take values out of the grid.")
    configs = []
    for seed, point in itertools.product(seeds, grid_points(grid)):
        tables = [base | point | arm | {"seed": seed} for arm in arms]
        configs += link_arms(tables, arms, source, following(seed, seeds))
    return configs


def check_plan(parts: Table, source: str) -> None:
    """Refuses what is no plan. Config keys are checked later, when configs are made of them."""
    if not parts:
        raise ConfigError(
            f"{source}: must have a table [base], [grid] or [[arms]]; it is empty. "
            "docs/sweeps.md has an example."
        )
    check_parts(parts, source)
    seeds: list[Any] = parts.get("seeds", [])
    grid: Table = parts.get("grid", {})
    arms: list[Any] = parts.get("arms", [])
    whole = all(type(seed) is int for seed in seeds)
    require_part(whole and len(set(seeds)) == len(seeds), "seeds", PARTS["seeds"][1], seeds, source)
    for key, values in grid.items():
        filled = isinstance(values, list) and len(values) > 0
        require_part(filled, f"{key} in [grid]", "a list of values", values, source)
    for arm in arms:
        require_part(isinstance(arm, dict), "arms", PARTS["arms"][1], arm, source)
        replay = arm.get("replay", "")
        name = "replay in [[arms]]"
        require_part(isinstance(replay, str), name, "the name of another arm", replay, source)
    if any("seed" in table for table in (parts.get("base", {}), grid, *arms)):
        raise ConfigError(
            f"{source}: seed must stand in the list of seeds, above the tables; it stands in one. "
            "Write seeds = [0, 1, 2]."
        )


def check_parts(parts: Table, source: str) -> None:
    """Refuses an unknown part, and one of another type."""
    for name, value in parts.items():
        if name not in PARTS:
            raise ConfigError(
                f"{source}: unknown key {name!r}.{nearest(name, PARTS)} "
                f"Known keys: {', '.join(PARTS)}."
            )
        kind, requirement = PARTS[name]
        holds = isinstance(value, kind) and (name == "base" or bool(value))
        require_part(holds, name, requirement, value, source)


def require_part(holds: bool, name: str, requirement: str, seen: Any, source: str) -> None:
    if not holds:
        raise ConfigError(
            f"{source}: {name} must be {requirement}; got {as_toml(seen)}. "
            "docs/sweeps.md has an example."
        )


def grid_size(grid: Table) -> int:
    """The number of combinations."""
    return math.prod(len(values) for values in grid.values())


def grid_points(grid: dict[str, list[Any]]) -> list[Table]:
    """Every combination of the grid's values; the last key's values change fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def following(seed: int, seeds: Sequence[int]) -> int:
    """The seed after this one; after the last, the first."""
    return seeds[(list(seeds).index(seed) + 1) % len(seeds)]


def link_arms(tables: list[Table], arms: list[Table], source: str, other_seed: int) -> Configs:
    """The configs of one seed and point of the grid.

    An arm's `replay` names another arm; it becomes the path of that arm's folder, at `other_seed`
    for replay-sizes: at its own seed it would take the same steps on the same samples.
    """
    configs = [from_dict(table, TrainConfig(), source) for table in tables]
    waiting = {
        i: arm_index(arm["replay"], configs, source)
        for i, arm in enumerate(arms)
        if "replay" in arm
    }
    while waiting:
        ready = [i for i, recorded in waiting.items() if recorded not in waiting]
        if not ready:
            names = ", ".join(repr(configs[i].arm) for i in waiting)
            raise ConfigError(
                f"{source}: replay must lead to an arm that replays none; "
                f"it goes round among {names}. Change one of them."
            )
        for i in ready:
            recorded = configs[waiting.pop(i)]
            if configs[i].policy == "replay-sizes":
                recorded = dataclasses.replace(recorded, seed=other_seed)
            configs[i] = follow(configs[i], recorded)
    return configs


def arm_index(name: str, configs: Configs, source: str) -> int:
    """The index of the only arm of that name."""
    names = [config.arm for config in configs]
    if name not in names:
        raise ConfigError(
            f"{source}: replay must name an arm; got {name!r}.{nearest(name, names)} "
            f"Arms: {', '.join(names)}."
        )
    if names.count(name) > 1:
        raise ConfigError(
            f"{source}: replay must name one arm; {names.count(name)} arms are called {name!r}. "
            "Give each its own label."
        )
    return names.index(name)
