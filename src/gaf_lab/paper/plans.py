"""Every figure and table of the paper as a plan of runs, at three scales."""

import dataclasses
from collections.abc import Iterator

from gaf_lab.paper.items import ITEMS, Item, find_item
from gaf_lab.paper.scales import Reading, Scale, paper_setting, reduce_to_smoke, small_setting
from gaf_lab.settings.checks import MOST_SEEDS, check_count
from gaf_lab.settings.plan import Configs

SEEDS = {("small", "fig1"): 1, ("full", "fig3"): 1}  # exceptions to one for smoke, three else


def make_plan(
    name: str, scale: Scale = "smoke", reading: Reading = "paper", seeds: int | None = None
) -> Configs:
    """The runs of a figure: every arm at every point, for paired seeds from 0 on.

    fig2 needs no run; its plan is empty.

    Args:
        name: as in ITEMS.
        scale: how long the runs may take.
        reading: source of the setting for `full` and `smoke`: the paper's text or its code.
        seeds: None takes the scale's own number.

    Raises:
        ConfigError: for an unknown figure, or seeds below 1.
    """
    find_item(name)
    if seeds is not None:
        check_count("seeds", seeds, 1, MOST_SEEDS, "Three is the least that tells a difference.")
    points, make_arms = small_setting(name) if scale == "small" else paper_setting(name, reading)
    if scale == "smoke":
        points = [reduce_to_smoke(point) for point in points]
    configs = [
        config
        for seed in range(seeds or SEEDS.get((scale, name), 1 if scale == "smoke" else 3))
        for point in points
        for config in make_arms(dataclasses.replace(point, seed=seed))
    ]
    return list({config.hash: config for config in configs}.values())


def count_runs(scale: Scale, seeds: int | None = None) -> Iterator[tuple[Item, int]]:
    """Every figure with its number of runs."""
    for name, item in ITEMS.items():
        yield item, len(make_plan(name, scale, seeds=seeds))
