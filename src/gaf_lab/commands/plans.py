"""A plan by its name: a TOML file, a preset, or a figure or table of the paper."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from gaf_lab.settings.checks import MOST_SEEDS, ConfigError, check_count, nearest
from gaf_lab.settings.plan import Configs, from_file
from gaf_lab.settings.presets import PRESETS
from gaf_lab.settings.reading import with_task

if TYPE_CHECKING:
    from gaf_lab.paper.scales import Reading, Scale


def find_plan(
    name: str, seeds: int | None, scale: "Scale", reading: "Reading", task: str = ""
) -> Configs:
    """The configs of the plan of that name.

    Args:
        name: a file's path, or what `gaf presets` and `gaf paper` list.
        seeds: paired seeds from 0 on, at least 1; None takes the plan's own, for a preset one.
        scale: for the paper's plans, how far they are reduced; see `gaf_lab.paper.scales`.
        reading: for the paper's plans, the paper's text or its released code.
        task: for files and presets, the task of all runs, in place of their data set and model.

    Raises:
        ConfigError: for a name that is none of these, and for a file that is no plan.
    """
    if seeds is not None:
        check_count("seeds", seeds, 1, MOST_SEEDS)
    path = Path(name)
    if path.is_file() or path.suffix == ".toml":
        return from_file(path, None if seeds is None else range(seeds), task)
    if name in PRESETS:
        base = with_task(PRESETS[name], task) if task else PRESETS[name]
        return [dataclasses.replace(base, seed=seed) for seed in range(seeds or 1)]
    if task:
        raise ConfigError(
            f"task goes with a TOML file or a preset; got the plan {name!r}. Leave it out."
        )
    from gaf_lab.paper.items import ITEMS
    from gaf_lab.paper.plans import make_plan

    if name not in ITEMS:
        known = [*PRESETS, *ITEMS]
        raise ConfigError(
            f"sweep needs a TOML file, a preset or a figure of the paper; got {name!r}."
            f"{nearest(name, known)} Presets and figures: {', '.join(known)}."
        )
    return make_plan(name, scale, reading, seeds)
