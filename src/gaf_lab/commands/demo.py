"""`gaf demo`: label noise on MNIST-5k, with a table, figures, suspect labels and a page."""

import dataclasses
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from gaf_lab.commands.common import Words, say
from gaf_lab.settings.checks import MOST_SEEDS, check_count
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import DEMO

QUICK_PASSES = float(round(DEMO.passes / 3))


@dataclass
class DemoOptions:
    """Label noise on MNIST-5k in about a minute: averaging, GAF and its control, 3 paired seeds;
    then which of the labels are wrong."""

    out: Path = Path("runs/demo")
    """Folder for records, figures, labels/samples.csv and report.html.
    Replaces an earlier demo's runs in it."""
    seeds: int = 3
    """Paired seeds, at least 1. Higher narrows the intervals and takes longer."""
    passes: float = DEMO.passes
    """Length of each run in passes over the training set.
    Lower is faster and shows less memorisation."""
    quick: bool = False
    """A first look: one seed and a third of the passes, so no intervals and less memorisation.
    --seeds and --passes win over it."""


def run_demo(words: Words, console: Console) -> int:
    options = tyro.cli(DemoOptions, prog="gaf demo", args=words, default=default_options(words))
    from gaf_lab.experiments import demo as job
    from gaf_lab.records.locks import own_folder
    from gaf_lab.report.page import write_report
    from gaf_lab.report.table import results_table

    check_count("seeds", options.seeds, 1, MOST_SEEDS)
    base = dataclasses.replace(DEMO, passes=options.passes)
    started = time.perf_counter()
    stopped = False
    with own_folder(options.out, f"gaf demo {shlex.join(words)}"):
        job.clear(options.out)
        try:
            job.demo(options.out, console, options.seeds, base)
        except KeyboardInterrupt:
            stopped = True
            say(console, "\nStopped. The next demo in this folder starts anew.")
        runs = job.finished_runs(options.out, options.seeds, base)
        if not runs:
            say(console, "No run was finished; there is nothing to report.")
            return 130 if stopped else 1
        console.print(results_table(runs))
        suspects = None if stopped else show_labels(base, options.out, console)
        title = "GAF demo: label noise on MNIST-5k"
        page = write_report(runs, options.out, title=title, suspects=suspects)
    say(console, f"{len(runs)} runs in {time.perf_counter() - started:.0f} s. Page: {page}")
    return 130 if stopped else 0


def show_labels(base: TrainConfig, folder: Path, console: Console) -> dict[str, Any]:
    """Finds the wrong labels, says what was found, and returns the page's section."""
    from gaf_lab.experiments.audit_report import closing_words
    from gaf_lab.experiments.demo_labels import FOLDER, find_labels, label_section
    from gaf_lab.training.console import Progress

    with Progress(console) as progress:
        found = find_labels(base, folder, partial(progress, "judging labels"))
    say(console, f"Which labels are wrong: {folder / FOLDER / closing_words([found.line()])}")
    return label_section(found)


def default_options(words: Words) -> DemoOptions:
    """The options before those of the command line, which replace them."""
    if "--quick" in words:
        return DemoOptions(seeds=1, passes=QUICK_PASSES)
    return DemoOptions()
