"""Arms along the x of a figure: means, single seeds and the paper."""

from dataclasses import dataclass

from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import PANELS
from gaf_lab.paper.places import (
    Position,
    arm_names,
    arms_by_position,
    independent_of_x,
    paper_value,
    sort_positions,
)
from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import spread_over_seeds, values_by_seed


@dataclass(frozen=True)
class Series:
    """One arm in one measure, in the measure's panel units.

    Attributes:
        mean: (position, mean, deviation or None, n) along the axis.
        dots: (position, value) of single seeds.
        paper: (position, value) that the paper prints.
        everywhere: whether the arm is independent of x; its line goes across the axes.
    """

    arm: str
    mean: list[tuple[Position, float, float | None, int]]
    dots: list[tuple[Position, float]]
    paper: list[tuple[Position, float]]
    everywhere: bool


def all_series(item: Item, runs: list[Run], key: str, measure: Measure) -> list[Series]:
    """A series for each arm."""
    groups = arms_by_position(item, runs)
    found = []
    for name in arm_names(item, runs):
        at = [(x, arm) for x, arms in groups.items() for arm in arms if arm.name == name]
        found.append(make_series(item, name, at, key, measure))
    return found


def make_series(
    item: Item, name: str, at: list[tuple[Position, Arm]], key: str, measure: Measure
) -> Series:
    """The series of an arm, from its positions."""
    factor = PANELS[key].factor
    series = Series(name, [], [], [], any(independent_of_x(item, arm) for _, arm in at))
    for x, arm in at:
        spread = spread_over_seeds(arm, measure)
        if spread is not None:
            deviation = None if spread.deviation is None else spread.deviation * factor
            series.mean.append((x, spread.mean * factor, deviation, spread.n))
        values = values_by_seed(arm.counted_runs, measure).values()
        series.dots.extend((x, value * factor) for value in values)
    for x in sort_positions(item.paper.get(name, {})):
        value = paper_value(item, name, x, key)
        if value is not None:
            series.paper.append((x, value * factor))
    return series
