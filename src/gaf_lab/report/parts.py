"""The parts of a report's page: rows of results and of runs, figures with their pictures, notes."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from gaf_lab.progress import Tell
from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, gaf_of, group_by_point, point_names, score_of
from gaf_lab.report.cells import axes_with_values, charts_with_values
from gaf_lab.report.charts import caption_of
from gaf_lab.report.columns import Column
from gaf_lab.report.interactive import plotly_chart
from gaf_lab.report.measures import last_score, last_value, shown_measures, status
from gaf_lab.report.sheets import SheetCell
from gaf_lab.report.statistics import spread_over_seeds
from gaf_lab.report.text import NONE, listing, with_star

NAMED = 3  # arms that the title names one by one
TALL = 1800  # pixels
COLOURS = 64  # of a picture inside a page
MEANING = {  # a line on the page for each measure that it shows
    "selected": (
        "the evaluation with the best accuracy on held-out labels, which are as noisy as the "
        "training labels."
    ),
    "memorised": (
        "of the training samples with a wrong label, the share predicted as that wrong label, at "
        "the end. Lower is better."
    ),
    "corrected": (
        "of the same samples, the share predicted as their true label, at the end. "
        "Higher is better."
    ),
    "acceptance": (
        "of all micro-gradients, the share that went into an update; those of a skipped step "
        "count as not accepted."
    ),
    "steps_taken": (
        "of all steps, each of k micro-gradients, the share that updated the weights; "
        "the others were skipped."
    ),
}

Block = tuple[str, list[dict[str, Any]]]  # a point in words, and a row for each of its arms


# --- results -----------------------------------------------------------------------------------


def result_blocks(arms: list[Arm], columns: list[Column]) -> list[Block]:
    """The rows of the table of results, by point of the grid."""
    groups = group_by_point(arms)
    blocks = []
    for where, group in zip(point_names(groups), groups, strict=True):
        blocks.append((where, without_dashes([result_row(arm, columns) for arm in group])))
    return blocks


def result_row(arm: Arm, columns: list[Column]) -> dict[str, Any]:
    cells = [column.cell(arm) for column in columns]
    return {"arm": arm, "name": with_star(arm.method, arm), "cells": cells}


def without_dashes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without dashes in columns in which none has a value.

    Such as memorisation where no label is wrong.
    """
    cells = [row["cells"] for row in rows]
    empty = [set(column) == {(NONE, "")} for column in zip(*cells, strict=True)]
    for row in rows:
        pairs = zip(row["cells"], empty, strict=True)
        row["cells"] = [("", "") if none else cell for cell, none in pairs]
    return rows


def results_sheet(
    columns: list[Column], blocks: list[Block]
) -> tuple[list[str], list[list[SheetCell]]]:
    """The table of results for other programs: headings, and rows of cells."""
    headings = ["arm", "seeds", *(column.heading for column in columns)]
    rows: list[list[SheetCell]] = []
    for where, block in blocks:
        point = [where] if len(blocks) > 1 else []
        for row in block:
            rows.append([*point, row["name"], len(row["arm"].seeds), *row["cells"]])
    return (["point", *headings] if len(blocks) > 1 else headings), rows


def cell_note(arms: list[Arm]) -> str:
    """What a cell of the results is; the deviation is mentioned only if there is one."""
    spreads = [
        spread_over_seeds(arm, measure)
        for arm in arms
        for measure in shown_measures(score_of(arms))
    ]
    sizes = {spread.n for spread in spreads if spread is not None}
    if max(sizes, default=1) == 1:
        return "Of finished runs."
    some = " where n > 1" if min(sizes) == 1 else ""
    return f"Mean over seeds ± sample standard deviation{some}, of finished runs."


def column_meanings(columns: list[Column]) -> list[tuple[str, str]]:
    """(a column's name, what it means)."""
    meanings = []
    for measure in (column.measure for column in columns if column.measure.name in MEANING):
        chosen = measure.name == "selected"
        meaning = MEANING[measure.name]
        if chosen and measure.unit == "number":
            meaning = "the evaluation that is best on the held-out part of the training samples."
        meanings.append(("selected" if chosen else measure.label, meaning))
    return meanings


def page_title(arms: list[Arm]) -> str:
    """The methods, or GAF and how many others there are."""
    names = list(dict.fromkeys(arm.method for arm in arms))
    title = listing(names)
    if len(names) > NAMED:
        title = f"{(gaf_of(arms) or arms[0]).method} and {len(names) - 1} other arms"
    return title[:1].upper() + title[1:]


def last_name(arms: list[Arm]) -> str:
    """The heading of a run's last score."""
    score = score_of(arms)
    return f"last test {score.name}{' (%)' if score.share else ''}"


def run_row(run: Run, arm: Arm) -> dict[str, Any]:
    """A run in one row, under its arm's name."""
    passes, last = last_value(run, "passes"), last_score(run)
    return {
        "name": str(run.header.get("name") or run.folder.name),
        "arm": arm.name,
        "method": arm.method,
        "seed": run.seed,
        "status": status(run),
        "samples": f"{run.evals[-1]['samples']:,}" if run.evals else "0",
        "passes": NONE if passes is None else f"{passes:g}",
        "last": NONE if last is None else run.score.text(last).rstrip("%"),
        "hash": str(run.header.get("config_hash") or NONE),
    }


# --- figures -----------------------------------------------------------------------------------


def figure_parts(runs: list[Run], pictures: dict[str, Path], tell: Tell) -> list[dict[str, Any]]:
    """The figures, each with a view per axis."""
    charts = charts_with_values(runs)
    parts = []
    for number, chart in enumerate(charts, 1):
        tell("writing the page", number, len(charts))
        views = []
        for axis in axes_with_values(runs, chart):
            png = pictures[chart.stem(axis)].read_bytes()
            views.append(view_part(axis.name, png, plotly_chart(runs, chart, axis)))
        caption = caption_of(chart, runs)
        parts.append({"name": chart.name, "title": chart.title, "caption": caption, "views": views})
    return parts


def view_part(label: str, png: bytes, drawing: Any) -> dict[str, Any]:
    """One view of a figure: a picture as data URL, and what plotly draws in its place.

    drawing: a plotly figure; without any values, the picture stays.
    """
    url = "data:image/png;base64," + base64.b64encode(shrink_png(png)).decode()
    part: dict[str, Any] = {"label": label, "png": url, "drawing": None}
    drawn = None if drawing is None else json.loads(drawing.to_json())
    if drawn is not None and any(trace.get("x") for trace in drawn["data"]):
        part["drawing"] = {"data": drawn["data"], "layout": drawn["layout"]}
    return part


def shrink_png(png: bytes) -> bytes:
    """The picture in few colours, which takes a third of the bytes; tall ones are made smaller."""
    from PIL import Image

    out, picture = io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    if picture.height > TALL:
        scale = 2 / 3 if picture.height < 2 * TALL else 1 / 2
        size = round(scale * picture.width), round(scale * picture.height)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
