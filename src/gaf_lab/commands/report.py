"""`gaf report`: the table, figures and page of recorded runs."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import Positional

from gaf_lab.commands.common import Words, say
from gaf_lab.records import run as records
from gaf_lab.records.output import make_folder
from gaf_lab.settings.checks import ConfigError


@dataclass
class ReportOptions:
    """The table, figures and page of any set of runs."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, folders that hold such, a run's records.jsonl, or packs of runs.
    The files of results/ are packs."""
    out: Path | None = None
    """Folder for report.html and the figures.
    Without it, the first of the runs' folders, or for a pack runs/ and its name."""
    title: str | None = None
    """Heading of the page."""


def run_report(words: Words, console: Console) -> int:
    options = tyro.cli(ReportOptions, prog="gaf report", args=words)
    from gaf_lab.records.find import find_runs
    from gaf_lab.report.page import write_report
    from gaf_lab.report.table import results_table
    from gaf_lab.training.console import Progress

    if not options.runs:
        raise ConfigError(
            "report needs at least one folder of runs; got none. "
            "Give what `gaf train --out` or `gaf demo --out` wrote."
        )
    found = [run for run in find_runs(list(options.runs)) if run.evals]
    if not found:
        raise ConfigError("report needs a run with at least one evaluation; these have none yet.")
    out = options.out or page_folder(options.runs[0])
    console.print(results_table(found))
    make_folder(out)
    with Progress(console, "figure") as progress:
        path = write_report(found, out, title=options.title, tell=progress)
    say(console, f"Page: {path}")
    return 0


def page_folder(place: Path) -> Path:
    """The default folder for a place's report: its own, or for a pack runs/ and its name."""
    if place.is_dir():
        return place
    return place.parent if place.name == records.FILE else Path("runs") / place.stem
