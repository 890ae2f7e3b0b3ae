"""The page of a report. It is a function of the runs' records alone."""

import base64
import functools
import gzip
import json
from pathlib import Path
from typing import Any

from gaf_lab.progress import Tell, silent
from gaf_lab.records.run import Run
from gaf_lab.report import parts
from gaf_lab.report.arms import Arm
from gaf_lab.report.columns import result_columns
from gaf_lab.report.conditions import commands_of, departures, split_conditions
from gaf_lab.report.descriptions import descriptions
from gaf_lab.report.differences import difference_groups
from gaf_lab.report.figures import write_figures
from gaf_lab.report.palette import CROWD, palette
from gaf_lab.report.sentences import opening
from gaf_lab.report.sheets import write_sheets
from gaf_lab.report.table import arms_or_error
from gaf_lab.report.text import difference_as_text


def write_report(
    runs: list[Run],
    out: Path,
    title: str | None = None,
    tell: Tell = silent,
    suspects: dict[str, Any] | None = None,
) -> Path:
    """Writes the figures as PNG, `report.csv`, `report.tex` and `report.html` into a folder.

    The page needs no other file. The same runs give the same bytes.

    Args:
        runs: at least one.
        out: the folder; created if missing.
        title: the page's heading; by default, the arms.
        tell: called with what is being made, its number, and how many there are.
        suspects: what a section on wrong labels shows: `lede`, `facts`, `tiles` and `file`.

    Returns:
        The path of report.html.

    Raises:
        ValueError: without runs.
    """
    arms = arms_or_error(runs)
    pictures = write_figures(runs, out, tell)
    charts = parts.figure_parts(runs, pictures, tell)
    values = results(arms, out) | words(arms) | listed_runs(runs, arms)
    values |= {"title": title or parts.page_title(arms), "suspects": suspects}
    page = render("report.html.j2", charts, **values)
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def results(arms: list[Arm], out: Path) -> dict[str, Any]:
    """The table of results, also written as files, and the paired differences."""
    columns = result_columns(arms)
    blocks = parts.result_blocks(arms, columns)
    return {
        "columns": [column.heading for column in columns],
        "blocks": blocks,
        "files": write_sheets(*parts.results_sheet(columns, blocks), out / "report"),
        "cell_note": parts.cell_note(arms),
        "meanings": parts.column_meanings(columns),
        "starred": not all(arm.finished_runs for arm in arms),
        "differences": difference_groups(arms),
    }


def words(arms: list[Arm]) -> dict[str, Any]:
    """The summary, what each arm does, and the conditions."""
    summary, findings = opening(arms)
    shared, differing = split_conditions(arms)
    return {
        "summary": summary,
        "findings": findings,
        "descriptions": descriptions(arms),
        "shared": shared,
        "differing": differing,
        "departures": departures(arms, differing),
    }


def listed_runs(runs: list[Run], arms: list[Arm]) -> dict[str, Any]:
    """The arms with their colours, and a row for each run."""
    arm_of = {id(run): arm for arm in arms for run in arm.runs}
    return {
        "arms": arms,
        "last_name": parts.last_name(arms),
        "palette": palette(list(dict.fromkeys(arm.method for arm in arms))),
        "runs": [parts.run_row(run, arm_of[id(run)]) for run in runs],
        "commands": commands_of(runs),
    }


def render(template: str, charts: list[dict[str, Any]], **values: Any) -> str:
    """A page that contains all it needs: plotly and what it draws too, both compressed.

    charts: with "name", and "views" that have "drawing".
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["difference"] = difference_as_text
    drawings = {chart["name"]: [view["drawing"] for view in chart["views"]] for chart in charts}
    return environment.get_template(template).render(
        plotly=compressed_plotly(),
        drawings=compress(json.dumps(drawings)),
        charts=charts,
        crowd=CROWD,
        **values,
    )


@functools.cache
def compressed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return compress(get_plotlyjs())


def compress(text: str) -> str:
    """gzip in base64, which the page unpacks; the same text gives the same bytes."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
