"""`gaf bench guard`: what gaf.Guard notices, and what it saves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from gaf_lab.commands.bench_checks import MOST_BATCH, check_counts
from gaf_lab.commands.common import Words, say
from gaf_lab.records.output import make_file
from gaf_lab.settings.checks import check_count

MOST_WORKERS, MOST_SEEDS, MOST_STEPS = 64, 100, 1_000_000


@dataclass
class BenchGuardOptions:
    """Faults put into one of k workers: when Guard names it, false alarms, final accuracy."""

    k: tuple[int, ...] = (2, 4, 8)
    """Workers."""
    b: int = 32
    """Samples per micro-batch."""
    seeds: int = 3
    """Runs of each kind."""
    before: int = 200
    """Steps before the fault."""
    after: int = 200
    """Steps with it."""
    clean: int = 10_000
    """Steps without any fault, to count false alarms, for each task and k."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def run_bench_guard(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchGuardOptions, prog="gaf bench guard", args=words)
    check_counts("k", options.k, 2, MOST_WORKERS)
    check_count("b", options.b, 1, MOST_BATCH)
    check_count("seeds", options.seeds, 1, MOST_SEEDS)
    for name in ("before", "after", "clean"):
        check_count(name, getattr(options, name), 1, MOST_STEPS)
    if options.out is not None:
        make_file(options.out)
    from gaf_lab.bench.guard import GuardLengths, measure_false_alarms, measure_faults
    from gaf_lab.bench.guard_results import guard_tables
    from gaf_lab.bench.guard_tasks import load_guard_tasks
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress

    lengths = GuardLengths(options.before, options.after, options.clean)
    found, clean = [], []
    with Progress(console, "step") as progress:
        for task in load_guard_tasks(options.b):
            for k in options.k:
                found += measure_faults(task, k, options.seeds, lengths, progress)
                clean.append(measure_false_alarms(task, k, lengths, progress))
    for each in guard_tables(found, clean):
        console.print(each)
    if options.out is not None:
        write_measurements(
            [*found, *clean],
            options.out,
            {"b": options.b, "seeds": options.seeds, **lengths._asdict()},
        )
        say(console, f"Figures: {options.out}")
    return 0
