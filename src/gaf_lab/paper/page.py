"""One page for any of the paper's figures and tables, beside the paper's values.

Each figure has its paired differences with their intervals.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_lab.paper import sheet
from gaf_lab.paper.figures import has_anything, page_png, save_figure
from gaf_lab.paper.interactive import plotly_item
from gaf_lab.paper.items import Item
from gaf_lab.paper.page_table import (
    drop_empty_columns,
    gap_groups,
    table_headings,
    table_rows,
)
from gaf_lab.paper.panels import ACROSS, chart_of
from gaf_lab.paper.places import arm_names, tick_texts
from gaf_lab.paper.sentences import describe_outcome, figure_caption
from gaf_lab.paper.table import columns_not_run, table_blocks, table_columns
from gaf_lab.progress import Tell, silent
from gaf_lab.records.run import Run
from gaf_lab.report.arms import group_by_arm
from gaf_lab.report.conditions import commands_of, split_conditions
from gaf_lab.report.page import render
from gaf_lab.report.palette import SOFT, Shade, palette
from gaf_lab.report.parts import view_part

# a figure, its runs, and notes on them
Section = tuple[Item, list[Run], Sequence[str]]
PAPER = "paper"  # the button that shows the paper's values


def write_page(sections: Sequence[Section], out: Path, title: str, tell: Tell = silent) -> Path:
    """Writes `paper.html`, which needs no other file, and the figures as PNG into `out`.

    The same runs give the same bytes. A figure without runs is marked as such. tell: reports the
    progress. Returns the page's path.
    """
    parts = []
    for number, (item, runs, notes) in enumerate(sections, 1):
        tell("drawing", number, len(sections))
        parts.append(make_section(item, runs, notes, out))
    page = render(
        "paper.html.j2",
        title=title,
        sections=parts,
        charts=[part["chart"] for part in parts if part["chart"]],
    )
    path = out / "paper.html"
    path.write_text(page, encoding="utf-8")
    return path


def make_section(item: Item, runs: list[Run], notes: Sequence[str], out: Path) -> dict[str, Any]:
    """The page's parts for a figure."""
    save_figure(item, runs, out, notes)
    colours = palette(list(dict.fromkeys([*arm_names(item, runs), *item.paper])))
    common, _ = split_conditions(group_by_arm(runs)) if runs else ([], [])
    return {
        "id": item.id,
        "heading": sheet.heading(item),
        "claim": item.claim,
        "outcome": describe_outcome(item, runs),
        "notes": list(notes),
        "missing": item.kind != "plane" and not runs,
        "chart": make_chart(item, runs),
        "caption": figure_caption(item, runs),
        "chips": arm_buttons(item, runs, colours),
        "palette": colours,
        "place": "" if item.x is None else ACROSS[item.x],
        "compared": gap_groups(item, runs),
        "common": common,
        "commands": commands_of(runs),
    } | make_table(item, runs, notes)


def make_chart(item: Item, runs: list[Run]) -> dict[str, Any] | None:
    """The figure's views, one for each axis; None for a table, and without values."""
    if item.kind == "table" or not (item.kind == "plane" or has_anything(item, runs)):
        return None
    views = [
        view_part(axis.name, page_png(item, runs, axis), plotly_item(item, runs, axis))
        for axis in chart_of(item).axes
    ]
    return {"name": item.id, "title": "", "views": views} if views else None


def make_table(item: Item, runs: list[Run], notes: Sequence[str]) -> dict[str, Any]:
    """The columns and rows of the table: the figure itself, or the one beside a figure."""
    if item.kind == "table":
        columns = tick_texts(item, table_columns(item, runs))
        if not runs:
            return {"columns": columns, "blocks": [], "rows": []}
        missing = [*notes, *columns_not_run(item, runs)]
        blocks = table_blocks(item, runs)
        return {"columns": columns, "blocks": blocks, "rows": [], "notes": missing}
    columns, rows = drop_empty_columns(table_headings(item), table_rows(item, runs))
    return {"columns": columns, "blocks": [], "rows": [] if item.kind == "plane" else rows}


def arm_buttons(item: Item, runs: list[Run], colours: dict[str, Shade]) -> dict[str, Shade]:
    """The buttons above a figure: its arms, and the paper if it prints values."""
    if not runs or item.kind not in ("curves", "against"):
        return {}
    buttons = {name: colours[name] for name in arm_names(item, runs)}
    if any(item.paper.values()):
        buttons[PAPER] = Shade(SOFT, SOFT)
    return buttons
