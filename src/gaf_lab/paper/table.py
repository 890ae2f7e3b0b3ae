"""The paper's table: its lines and columns as text."""

from collections.abc import Iterable
from dataclasses import dataclass

from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import PANEL_MEASURES, measure_title
from gaf_lab.paper.places import (
    Position,
    arm_names,
    arms_by_position,
    differences_by_position,
    paper_positions,
    sort_positions,
    tick_texts,
)
from gaf_lab.records.run import Run
from gaf_lab.report.arms import BASELINE
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Difference, spread_over_seeds
from gaf_lab.report.text import MINUS, NONE, signed, spread_as_text

# they separate agreement from fewer steps and from smaller batches
KEY_CONTROLS = ("random subset", "replay skip")


@dataclass(frozen=True)
class TableRow:
    """A line of the table.

    Attributes:
        arm: the arm whose colour it has; None for a difference.
        cells: (value, what stands beside or beneath it) by column.
        paper: whether the values are the paper's.
    """

    name: str
    arm: str | None
    cells: list[tuple[str, str]]
    paper: bool = False


def table_columns(item: Item, runs: list[Run]) -> list[Position]:
    """The columns that were run; without runs the paper's."""
    return sort_positions([*arms_by_position(item, runs)] or paper_positions(item))


def columns_not_run(item: Item, runs: list[Run]) -> list[str]:
    """A sentence on the columns of the paper that were not run, if there are any."""
    columns = table_columns(item, runs)
    missing = [x for x in sort_positions(paper_positions(item)) if x not in columns]
    if not missing:
        return []
    return [f"Not run here: the paper's columns {', '.join(tick_texts(item, missing))}."]


def table_blocks(item: Item, runs: list[Run]) -> list[tuple[str, list[TableRow]]]:
    """The table once for each measure: the arms, differences to GAF, and the paper's lines."""
    groups, columns, key = arms_by_position(item, runs), table_columns(item, runs), item.keys[0]
    blocks = []
    for measure in PANEL_MEASURES[key]:
        arms = [arm for group in groups.values() for arm in group]
        if runs and not any(spread_over_seeds(arm, measure) for arm in arms):
            continue
        rows = [
            *arm_rows(item, runs, columns, measure),
            *gap_rows_of(item, runs, columns, measure),
            *paper_rows(item, columns),
        ]
        blocks.append((measure_title(key, measure), rows))
    return blocks


def arm_rows(
    item: Item, runs: list[Run], columns: list[Position], measure: Measure
) -> list[TableRow]:
    groups = arms_by_position(item, runs)
    at = {(x, arm.name): arm for x, arms in groups.items() for arm in arms}
    rows = []
    for name in arm_names(item, runs):
        arms = [at.get((x, name)) for x in columns]
        spreads = [None if arm is None else spread_over_seeds(arm, measure) for arm in arms]
        rows.append(TableRow(name, name, [spread_as_text(one, measure) for one in spreads]))
    return rows


def gap_rows_of(
    item: Item, runs: list[Run], columns: list[Position], measure: Measure
) -> list[TableRow]:
    """The differences between GAF and averaging, and between its arms and the key controls."""
    found = differences_by_position(item, runs, measure)
    controls = key_controls(gap for _, gap in found)
    gaps = {(x, gap.arm, gap.other): gap for x, gap in found}
    rows = []
    for one, other in dict.fromkeys((gap.arm, gap.other) for _, gap in found):
        if (one, other) == ("GAF", BASELINE) or other in controls:
            cells = [gap_cell(gaps.get((x, one, other))) for x in columns]
            rows.append(TableRow(f"{one} {MINUS} {other}", None, cells))
    return rows


def key_controls(gaps: Iterable[Difference]) -> list[str]:
    """Those among the arms; random skip where none is, since with k = 2 each would repeat GAF."""
    others = {gap.other for gap in gaps}
    return [name for name in KEY_CONTROLS if name in others] or ["random skip"]


def paper_rows(item: Item, columns: list[Position]) -> list[TableRow]:
    rows = []
    for name, line in item.paper.items():
        values = [line.get(x) for x in columns]
        cells = [(NONE if value is None else f"{100 * value:g}", "") for value in values]
        rows.append(TableRow(f"{name}, paper", name, cells, paper=True))
    return rows


def gap_cell(gap: Difference | None) -> tuple[str, str]:
    """The difference and its interval."""
    if gap is None:
        return NONE, ""
    if gap.low is None or gap.high is None:
        return signed(100 * gap.mean), ""
    return signed(100 * gap.mean), f"{signed(100 * gap.low)} to {signed(100 * gap.high)}"
