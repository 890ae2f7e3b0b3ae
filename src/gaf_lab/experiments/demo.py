"""The main job in a minute: label noise on MNIST-5k; averaging, GAF, and the control that has GAF's steps and batch sizes.

One process with one thread for each core: the network is small, and a second thread would not make it faster.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path

from rich.console import Console

from gaf_lab.paper.reproduce import announce
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import DEMO
from gaf_lab.sweeps.jobs import is_finished
from gaf_lab.sweeps.sweep import sweep


def arms(seed: int, base: TrainConfig) -> dict[str, TrainConfig]:
    """Runs of one seed by the names of their folders."""
    seeded = dataclasses.replace(base, seed=seed)
    return {
        f"gaf-{seed}": seeded,
        f"averaging-{seed}": dataclasses.replace(seeded, policy="mean"),
        f"random-subset-{seed}": dataclasses.replace(
            seeded, policy="random-subset", replay=Path(f"gaf-{seed}")
        ),
    }


def clear(folder: Path) -> None:
    """Removes the runs of an earlier demo from the folder, and leaves everything else.

    Raises:
        ConfigError: where another run stands in the place of a demo's.
    """
    for file in folder.glob(f"*/{records.FILE}"):
        if not re.fullmatch(r"(gaf|averaging|random-subset)-\d+", file.parent.name):
            continue
        with file.open(errors="replace") as lines:
            header = lines.readline()
        if header and '"command": "gaf demo' not in header:
            raise ConfigError(
                f"output folder {folder}: must hold no runs but a demo's under a demo's names; {file.parent.name} is another "
                "run. Give another folder with --out."
            )
        shutil.rmtree(file.parent)


def demo(
    folder: Path,
    console: Console,
    seeds: int = 3,
    base: TrainConfig = DEMO,
    workers: int | None = None,
) -> list[records.Run]:
    """Runs all arms for all seeds and returns what is finished; Ctrl-C stops early and keeps that."""
    plan = {name: config for seed in range(seeds) for name, config in arms(seed, base).items()}
    command = f"gaf demo --seeds {seeds} --passes {base.passes:g} --out {folder}"
    at_once = workers or os.cpu_count() or 1
    announce(list(plan.values()), at_once, console)
    try:
        sweep(
            list(plan.values()),
            folder,
            workers=at_once,
            data_folder=None,
            console=console,
            command=command,
            keep_checkpoints=False,
            names=list(plan),
        )
    except KeyboardInterrupt:
        console.print(
            "\nStopped. The page holds the finished runs. The next demo in this folder starts anew."
        )
    return [records.read(folder / name) for name in plan if is_finished(folder / name)]
