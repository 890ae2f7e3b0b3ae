"""`gaf sweep`: a plan of runs, several at a time."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from gaf_lab.commands.common import Words, failures_code, say
from gaf_lab.commands.without_effect import is_given
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.cores import cores
from gaf_lab.settings.presets import PRESETS


@dataclass
class SweepOptions:
    """Runs a list of configs, several at a time. Resumes what was interrupted, repeats nothing."""

    plan: Positional[str]
    """A TOML file (docs/sweeps.md), a preset, or a figure or table of the paper."""
    out: Path | None = None
    """Folder for the runs' folders and the index sweep.jsonl.
    Without it, runs/ and the plan's name.
    For Ray, all machines share it."""
    workers: int | None = None
    """Runs at the same time.
    Without it, one for each core, with Ray as many as the cluster has room for."""
    seeds: int | None = None
    """Paired seeds, at least 1, in place of the plan's."""
    task: str = ""
    """A task of your own for all runs of a file or preset, as in gaf train."""
    data: Path | None = None
    """Folder with the data sets' archives; without it, they are downloaded.
    With --task: the file or folder that it reads."""
    scale: Literal["smoke", "small", "full"] = "smoke"
    """For a figure or table of the paper: as in gaf paper."""
    reading: Literal["paper", "code"] = "paper"
    """For a figure or table of the paper: as in gaf paper."""
    engine: Literal["local", "together", "ray"] = "local"
    """Processes on this machine; runs that take turns in one process, which share a GPU;
    or tasks on a Ray cluster."""
    address: str = "auto"
    """Address of the Ray cluster; auto is the one that this machine is part of."""
    dry_run: bool = False
    """Lists the runs and how far each is, and starts none."""


def check_papers_options(words: Words, plan: str) -> None:
    """Refuses options of the paper's plans with others."""
    other = plan in PRESETS or Path(plan).is_file()
    for option in ("scale", "reading"):
        if other and is_given(words, option):
            raise ConfigError(
                f"{option} goes with a figure or table of the paper alone; got it with the plan "
                f"{plan!r}. Leave --{option} out."
            )


def run_sweep(words: Words, console: Console) -> int:
    options = tyro.cli(SweepOptions, prog="gaf sweep", args=words)
    from gaf_lab.commands.plans import find_plan
    from gaf_lab.sweeps.jobs import describe_plan
    from gaf_lab.sweeps.sweep import sweep
    from gaf_lab.sweeps.worker import INDEX

    check_papers_options(words, options.plan)
    configs = find_plan(options.plan, options.seeds, options.scale, options.reading, options.task)
    out = options.out or Path("runs") / Path(options.plan).stem
    command = f"gaf sweep {shlex.join(words)}"
    if options.dry_run:
        for line in describe_plan(configs, out):
            say(console, line)
        return 0
    started = time.perf_counter()
    how: dict[str, Any] = {
        "workers": runs_at_once(options, len(configs)),
        "data_folder": options.data,
        "engine": options.engine,
        "address": options.address,
        "command": command,
    }
    try:
        swept = sweep(configs, out, console=console, **how)
    except KeyboardInterrupt:
        say(console, f"\nStopped. Go on with the same command: {command}")
        return 130
    page = f" Page: gaf report {out}" if swept.runs else ""
    say(
        console,
        f"{len(swept.runs)} of {len(swept.runs) + len(swept.failed)} runs are finished, "
        f"in {time.perf_counter() - started:.0f} s. Index: {out / INDEX}.{page}",
    )
    return failures_code(console, swept.failed)


def runs_at_once(options: SweepOptions, runs: int) -> int:
    if options.workers is not None:
        return options.workers
    return runs if options.engine == "ray" else cores()
