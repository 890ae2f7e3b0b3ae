"""One page for any of the paper's figures and tables: each beside the paper's values, with paired differences and their intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_lab.paper import figures as pf
from gaf_lab.paper import sheet
from gaf_lab.paper.figures import Place
from gaf_lab.paper.items import Item
from gaf_lab.progress import Tell, silent
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import BASELINE, Arm, group_by_arm
from gaf_lab.report.conditions import commands_of, split_conditions
from gaf_lab.report.differences import bars, reading
from gaf_lab.report.figures import SOFT, Shade, palette
from gaf_lab.report.findings import WHEN, amount, certainty
from gaf_lab.report.measures import Measure
from gaf_lab.report.page import render
from gaf_lab.report.parts import view_part
from gaf_lab.report.sentences import few_seeds_caveat
from gaf_lab.report.text import MINUS, NONE, signed, spread_as_text, unbreakable, with_star

# a figure, its runs, and what must be said of how they came to be
Section = tuple[Item, list[Run], Sequence[str]]
PAPER = "paper"  # the button that shows the paper's values


def write(sections: Sequence[Section], out: Path, title: str, tell: Tell = silent) -> Path:
    """Writes the figures as PNG and `paper.html`, one file that needs no other, into the folder `out`. Returns the page's path.

    The same runs give the same bytes. A figure without runs is a figure without values; that is said. tell: how far it is.
    """
    parts = []
    for number, (item, runs, notes) in enumerate(sections, 1):
        tell("drawing", number, len(sections))
        parts.append(section(item, runs, notes, out))
    page = render(
        "paper.html.j2",
        title=title,
        sections=parts,
        charts=[part["chart"] for part in parts if part["chart"]],
    )
    path = out / "paper.html"
    path.write_text(page, encoding="utf-8")
    return path


def section(item: Item, runs: list[Run], notes: Sequence[str], out: Path) -> dict[str, Any]:
    """What the page shows of a figure."""
    pf.draw(item, runs, out, notes)
    there = item.kind == "plane" or pf.has_anything(item, runs)
    axes = pf.chart_of(item).axes if there and item.kind != "table" else ()
    views = [
        view_part(axis.name, pf.picture(item, runs, axis), pf.interactive(item, runs, axis))
        for axis in axes
    ]
    columns, listed = without_gaps(headings(item), rows(item, runs))
    colours = palette(list(dict.fromkeys([*pf.names_of(item, runs), *item.paper])))
    compared = gaps(item, runs)
    measured = item.kind != "plane"
    common, _ = split_conditions(group_by_arm(runs)) if runs else ([], [])
    return {
        "id": item.id,
        "heading": sheet.heading(item),
        "claim": item.claim,
        "outcome": outcome(item, runs),
        "notes": [
            *notes,
            *(pf.columns_not_run(item, runs) if runs and item.kind == "table" else []),
        ],
        "missing": measured and not runs,
        "chart": {"name": item.id, "title": "", "views": views} if views else None,
        "caption": caption(item, runs),
        "chips": chips(item, runs, colours),
        "palette": colours,
        "columns": pf.ticks(item, pf.columns_of(item, runs)) if item.kind == "table" else columns,
        "blocks": pf.blocks(item, runs) if item.kind == "table" and runs else [],
        "rows": listed if item.kind in ("curves", "against") else [],
        "place": "" if item.x is None else pf.ACROSS[item.x],
        "compared": compared,
        "common": common,
        "commands": commands_of(runs),
    }


def chips(item: Item, runs: list[Run], colours: dict[str, Shade]) -> dict[str, Shade]:
    """The buttons above a figure: its arms, and the paper where it prints something."""
    paper = {PAPER: Shade(SOFT, SOFT)} if any(item.paper.values()) else {}
    return (
        {name: colours[name] for name in pf.names_of(item, runs)} | paper
        if runs and item.kind in ("curves", "against")
        else {}
    )


# --- sentences ---------------------------------------------------------------------------------------------------


def caption(item: Item, runs: list[Run]) -> str:
    if item.kind == "plane" or not runs:
        return ""
    marks = (
        " Circles: the evaluation that noisy held-out labels select."
        if "test_accuracy" in item.keys and item.kind == "curves"
        else ""
    )
    seeds = (
        "Bold: mean over seeds; thin: single runs."
        if item.kind == "curves"
        else "Lines: mean over seeds; dots: single seeds."
    )
    paper = " Diamonds: the paper's values." if any(item.paper.values()) else ""
    return seeds + marks + paper + (distances(runs) if "distance_mean" in item.keys else "")


def distances(runs: list[Run]) -> str:
    """What the distances are to."""
    if all(run.header["config"]["k"] == 2 for run in runs):
        return " Distance: of a step's two micro-gradients, whatever the arm does with them."
    return (" Distance: to the running sum, which holds the accepted micro-gradients, under averaging all earlier ones; so the same "
            "micro-gradients have another distance in another arm, and arms do not compare in it.")  # fmt: skip


def outcome(item: Item, runs: list[Run]) -> list[str]:
    """What came out, in sentences: where GAF is above the others, and how far the distances reach."""
    found = []
    if "test_accuracy" in item.keys:
        for measure, when in WHEN:
            gaps = pf.differences(item, runs, measure)
            for other in (BASELINE, *pf.CONTROLS):
                of = [(x, gap) for x, gap in gaps if (gap.arm, gap.other) == ("GAF", other)]
                found += [counted(item, when, of)] if of else []
        found += few_seeds_caveat(gap.n for _, gap in pf.differences(item, runs, measures.LAST))
    if "distance_mean" in item.keys:
        found += reached(item, runs)
    return [unbreakable(sentence) for sentence in found]


def counted(item: Item, when: str, of: list[tuple[Place, st.Difference]]) -> str:
    """GAF against one other arm, at all places."""
    gap = of[0][1]
    if len(of) == 1:
        return f"{when}, {gap.arm} is {amount(gap)} {gap.other} {certainty(gap)}."
    above, below = (
        sum(g.clear and g.mean > 0 for _, g in of),
        sum(g.clear and g.mean < 0 for _, g in of),
    )
    ends = sorted(of, key=lambda one: one[1].mean)
    low, high = (f"{signed(g.mean * 100)} ({pf.spoken(item, x)})" for x, g in (ends[0], ends[-1]))
    span = f"{when}, {gap.arm} {MINUS} {gap.other} runs from {low} to {high} points"
    if max(g.n for _, g in of) < st.ENOUGH:
        return f"{span}; these are too few seeds to tell any difference."
    return (f"{span}; of {len(of)} differences {above} can be told to be above 0, {below} below, "
            f"{len(of) - above - below} neither.")  # fmt: skip


def reached(item: Item, runs: list[Run]) -> list[str]:
    """How far cosine distances reach, over all arms."""
    values = {measure.name: [(value, x, arm.name) for x, of in pf.grouped(item, runs).items() for arm in of
                             if (spread := st.spread_over_seeds(arm, measure)) and (value := spread.mean) is not None]
              for measure in pf.DISTANCES}  # fmt: skip
    if not values["distance"]:
        return []
    low, high, least = min(values["distance"]), max(values["distance"]), min(values["lowest"])
    spans = f"The mean cosine distance of a run is {low[0]:.3f}" if low == high else (
        f"The mean cosine distance of a run goes from {low[0]:.3f} ({low[2]}, {pf.spoken(item, low[1])}) to {high[0]:.3f} "
        f"({high[2]}, {pf.spoken(item, high[1])})")  # fmt: skip
    return [f"{spans}; the lowest evaluation has {least[0]:.3f}."]


# --- tables ------------------------------------------------------------------------------------------------------


def headings(item: Item) -> list[str]:
    """The columns of the table beside a figure: each key's measures, and the paper's value where it prints one."""
    found = []
    for key in item.keys:
        found += [pf.titled(key, measure) for measure in pf.PANEL_MEASURES[key]]
        found += (
            ["paper" + (f" ({pf.PANELS[key].unit})" if pf.PANELS[key].unit else "")]
            if has_paper(item, key)
            else []
        )
    return [*found, "n"]


def without_gaps(
    columns: list[str], listed: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows without those columns, n apart, that no row has a value in."""
    cells = [row["cells"] for row in listed]
    kept = [
        i for i in range(len(columns) - 1) if not cells or any(row[i][0] != NONE for row in cells)
    ]
    return [columns[i] for i in (*kept, -1)], [
        row | {"cells": [row["cells"][i] for i in kept]} for row in listed
    ]


def has_paper(item: Item, key: str) -> bool:
    return any(
        pf.printed(item, arm, x, key) is not None for arm, row in item.paper.items() for x in row
    )


def rows(item: Item, runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each arm at each place; the place is named once."""
    found = []
    for x, of in pf.grouped(item, runs).items():
        for i, arm in enumerate(of):
            found.append({"place": pf.ticks(item, [x])[0] if i == 0 else "", "rows": len(of), "arm": arm.name,
                          "name": with_star(arm.name, arm), "cells": cells(item, x, arm), "n": len(arm.seeds)})  # fmt: skip
    return found


def cells(item: Item, x: Place, arm: Arm) -> list[tuple[str, str]]:
    found = []
    for key in item.keys:
        found += [
            spread_as_text(st.spread_over_seeds(arm, measure), measure, 1.0)
            for measure in pf.PANEL_MEASURES[key]
        ]
        if has_paper(item, key):
            value, panel = pf.printed(item, arm.name, x, key), pf.PANELS[key]
            found.append(
                (NONE if value is None else f"{value * panel.factor:.{panel.digits}f}", "")
            )
    return found


def gaps(item: Item, runs: list[Run]) -> list[dict[str, Any]]:
    """The paired differences by measure, each with the place that it holds at."""
    shares = [
        measure
        for key in item.keys
        for measure in pf.PANEL_MEASURES[key]
        if measure.unit == "share"
    ]
    return [group for measure in shares if (group := compared(item, runs, measure))["rows"]]


def compared(item: Item, runs: list[Run], measure: Measure) -> dict[str, Any]:
    found = pf.differences(item, runs, measure)
    many = len(pf.grouped(item, runs)) > 1
    listed = [
        {
            "gap": gap,
            "one": gap.arm,
            "other": gap.other,
            "bar": bar,
            "verdict": reading(gap),
            "at": f", {pf.spoken(item, x)}" if many else "",
        }
        for (x, gap), bar in zip(found, bars([gap for _, gap in found]), strict=True)
    ]
    return {"label": measure.label, "rows": listed}
