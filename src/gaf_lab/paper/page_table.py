"""The table beside a figure: its arms at every place, and their paired differences."""

from typing import Any

from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import PANEL_MEASURES, PANELS, measure_title
from gaf_lab.paper.places import (
    Position,
    arms_by_position,
    differences_by_position,
    paper_value,
    position_in_words,
    tick_texts,
)
from gaf_lab.records.run import Run
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import Arm
from gaf_lab.report.differences import bars, reading
from gaf_lab.report.measures import Measure
from gaf_lab.report.text import NONE, spread_as_text, with_star


def table_headings(item: Item) -> list[str]:
    """Each key's measures, and the paper's value if it prints one; then n."""
    found = []
    for key in item.keys:
        found += [measure_title(key, measure) for measure in PANEL_MEASURES[key]]
        if has_paper_value(item, key):
            unit = PANELS[key].unit
            found.append(f"paper ({unit})" if unit else "paper")
    return [*found, "n"]


def drop_empty_columns(
    columns: list[str], rows: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows without the columns, n apart, that have no value in any row."""
    kept = [
        i
        for i in range(len(columns) - 1)
        if not rows or any(row["cells"][i][0] != NONE for row in rows)
    ]
    narrower = [row | {"cells": [row["cells"][i] for i in kept]} for row in rows]
    return [columns[i] for i in (*kept, -1)], narrower


def has_paper_value(item: Item, key: str) -> bool:
    return any(
        paper_value(item, arm, x, key) is not None for arm, row in item.paper.items() for x in row
    )


def table_rows(item: Item, runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each arm at each place; the first row of a place names it."""
    found = []
    for x, arms in arms_by_position(item, runs).items():
        for i, arm in enumerate(arms):
            row = {
                "place": tick_texts(item, [x])[0] if i == 0 else "",
                "rows": len(arms),
                "arm": arm.name,
                "name": with_star(arm.name, arm),
                "cells": row_cells(item, x, arm),
                "n": len(arm.seeds),
            }
            found.append(row)
    return found


def row_cells(item: Item, x: Position, arm: Arm) -> list[tuple[str, str]]:
    found = []
    for key in item.keys:
        for measure in PANEL_MEASURES[key]:
            found.append(spread_as_text(st.spread_over_seeds(arm, measure), measure, 1.0))
        if has_paper_value(item, key):
            value, panel = paper_value(item, arm.name, x, key), PANELS[key]
            text = NONE if value is None else f"{value * panel.factor:.{panel.digits}f}"
            found.append((text, ""))
    return found


def gap_groups(item: Item, runs: list[Run]) -> list[dict[str, Any]]:
    """The paired differences by measure, each with its place."""
    groups = []
    for key in item.keys:
        for measure in PANEL_MEASURES[key]:
            rows = gap_rows(item, runs, measure) if measure.unit == "share" else []
            if rows:
                groups.append({"label": measure.label, "rows": rows})
    return groups


def gap_rows(item: Item, runs: list[Run], measure: Measure) -> list[dict[str, Any]]:
    found = differences_by_position(item, runs, measure)
    many = len(arms_by_position(item, runs)) > 1
    rows = []
    for (x, gap), bar in zip(found, bars([gap for _, gap in found]), strict=True):
        row = {
            "gap": gap,
            "one": gap.arm,
            "other": gap.other,
            "bar": bar,
            "verdict": reading(gap),
            "at": f", {position_in_words(item, x)}" if many else "",
        }
        rows.append(row)
    return rows
