"""The main job in a minute: label noise on MNIST-5k.

The arms are averaging, GAF, and the control with GAF's steps and batch sizes. Each core has a
process of one thread; the network is too small to gain from a second thread.
"""

import dataclasses
import re
import shutil
from pathlib import Path

from rich.console import Console

from gaf_lab.paper.estimate import announce
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.cores import cores
from gaf_lab.settings.presets import DEMO
from gaf_lab.sweeps.jobs import is_finished
from gaf_lab.sweeps.sweep import sweep


def demo_arms(seed: int, base: TrainConfig) -> dict[str, TrainConfig]:
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
    """Removes the runs of an earlier demo from the folder, and keeps everything else.

    Raises:
        ConfigError: if another run has the folder of a demo's run.
    """
    for file in folder.glob(f"*/{records.FILE}"):
        if not re.fullmatch(r"(gaf|averaging|random-subset)-\d+", file.parent.name):
            continue
        with file.open(errors="replace") as lines:
            header = lines.readline()
        if header and '"command": "gaf demo' not in header:
            raise ConfigError(
                f"output folder {folder}: must hold no runs but a demo's under a demo's names; "
                f"{file.parent.name} is another run. Give another folder with --out."
            )
        shutil.rmtree(file.parent)


def demo(
    folder: Path,
    console: Console,
    seeds: int = 3,
    base: TrainConfig = DEMO,
    workers: int | None = None,
) -> None:
    """Runs all arms for all seeds, and announces how long that takes.

    Raises:
        KeyboardInterrupt: after the processes have been stopped; finished runs are kept.
    """
    plan = demo_plan(seeds, base)
    configs = list(plan.values())
    workers = workers or cores()
    seconds = announce(configs, workers, console)
    sweep(
        configs,
        folder,
        workers=workers,
        data_folder=None,
        console=console,
        command=f"gaf demo --seeds {seeds} --passes {base.passes:g} --out {folder}",
        keep_checkpoints=False,
        names=list(plan),
        seconds=seconds,
    )


def finished_runs(folder: Path, seeds: int, base: TrainConfig) -> list[records.Run]:
    """The demo's finished runs in a folder, in the order of its plan."""
    folders = [folder / name for name in demo_plan(seeds, base)]
    return [records.read(place) for place in folders if is_finished(place)]


def demo_plan(seeds: int, base: TrainConfig) -> dict[str, TrainConfig]:
    """The demo's runs by the names of their folders."""
    return {name: config for seed in range(seeds) for name, config in demo_arms(seed, base).items()}
