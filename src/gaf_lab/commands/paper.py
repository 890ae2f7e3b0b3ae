"""`gaf paper`: figures and tables of the paper."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from gaf_lab.commands.common import Words, failures_code, say
from gaf_lab.settings.checks import MOST_WORKERS, check_count
from gaf_lab.settings.cores import cores


@dataclass
class PaperOptions:
    """Figures and tables of the paper: runs them and sets them beside the paper's values."""

    ids: Positional[tuple[str, ...]] = ()
    """Which, such as fig6 or table1; all for every one."""
    list: bool = False
    """Lists the figures and tables, the paper's claims, and the number of runs for each."""
    scale: Literal["smoke", "small", "full"] = "smoke"
    """smoke: seconds, to see it run; small: up to two hours on two cores;
    full: the paper's setting, for a GPU."""
    reading: Literal["paper", "code"] = "paper"
    """Whose setting, where the paper and its released code differ."""
    data: Path | None = None
    """Folder with the data sets' archives; without it, they are downloaded."""
    out: Path = Path("runs/paper")
    """Folder for runs, figures and the page.
    Figures share its runs; finished runs are not repeated."""
    seeds: int | None = None
    """Paired seeds, at least 1, in place of the scale's number."""
    workers: int | None = None
    """Runs at the same time; without it, one for each core."""
    engine: Literal["local", "together", "ray"] = "local"
    """Processes on this machine; runs that take turns on one GPU;
    or tasks on a Ray cluster that shares the folder --out."""
    address: str = "auto"
    """Address of the Ray cluster."""


def run_paper(words: Words, console: Console) -> int:
    options: Any = tyro.cli(PaperOptions, prog="gaf paper", args=words)
    if options.list or not options.ids:
        return list_items(options, console)
    from gaf_lab.paper import items
    from gaf_lab.paper.reproduce import reproduce
    from gaf_lab.records.locks import own_folder

    workers = options.workers if options.workers is not None else cores()
    check_count("workers", workers, 1, MOST_WORKERS, "One for each core is usual.")
    names = [items.find_item(name).id for name in options.ids if name != "all"]
    if options.ids == ("all",):
        names = list(items.ITEMS)
    command = f"gaf paper {shlex.join(words)}"
    how: dict[str, Any] = {
        "reading": options.reading,
        "seeds": options.seeds,
        "data_folder": options.data,
        "workers": workers,
        "engine": options.engine,
        "address": options.address,
        "command": command,
    }
    try:
        with own_folder(options.out, command):
            page, swept = reproduce(names, options.scale, options.out, console, **how)
    except KeyboardInterrupt:
        say(console, f"\nStopped. Go on with: {command}")
        return 130
    say(console, f"Page: {page}")
    return failures_code(console, swept.failed)


def list_items(options: Any, console: Console) -> int:
    """A table of all figures and tables."""
    from rich.table import Table

    from gaf_lab.paper.plans import count_runs

    table = Table("id", "figure or table", "the paper's claim", "runs")
    for item, count in count_runs(options.scale, options.seeds):
        table.add_row(item.id, item.title, item.claim, str(count))
    console.print(table)
    return 0
