"""The output folder of a run: whether it can begin or go on there, and its first lines."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gaf_lab.data.run_data import RunData
from gaf_lab.records import checkpoint, environment
from gaf_lab.records import run as records
from gaf_lab.records.output import make_folder
from gaf_lab.settings.checks import ConfigError, first_line
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.ranks import Group, launch


def check_output_folder(config: TrainConfig, folder: Path, resume: bool) -> records.Run | None:
    """Refuses a folder that the config cannot run in.

    Returns:
        the run in it, if that is finished, so that nothing is left to do.
    """
    prepare_folder(folder, resume)
    if not resume or never_began(folder):
        return None
    return finished_run(config, folder)


def prepare_folder(folder: Path, resume: bool) -> None:
    """Makes the folder if it is missing. Refuses one with a run, or without one to resume."""
    if resume and not never_began(folder):
        checkpoint.find_checkpoint(folder)
    make_folder(folder)
    if not resume and (folder / records.FILE).exists() and not never_began(folder):
        raise ConfigError(
            f"output folder {folder}: must not hold a run yet; it does. "
            "Go on with --resume, or give another --out."
        )


def never_began(folder: Path) -> bool:
    """Whether the run in `folder` was stopped before its first checkpoint and evaluation.

    Such a run begins anew, and nothing is lost.
    """
    path = folder / records.FILE
    if not path.is_file() or (folder / checkpoint.CHECKPOINT_FILE).is_file():
        return False
    text = path.read_text(errors="replace")
    return (not text or text.startswith('{"kind": "run"')) and '{"kind": "eval"' not in text


def prepare_restart(folder: Path) -> bool:
    """Whether torchrun, not the user, starts the run in `folder` again after a worker failed.

    Removes the records of a run that torchrun starts again without a checkpoint: it begins anew.
    """
    command = launch()
    if command is None or not (folder / records.FILE).is_file():
        return False
    if records.read(folder).header.get("launch") != command:
        return False
    if (folder / checkpoint.CHECKPOINT_FILE).is_file():
        return True
    (folder / records.FILE).unlink()
    return False


def finished_run(config: TrainConfig, folder: Path) -> records.Run | None:
    """The run in `folder`, if it is finished and of this config: nothing is left to resume."""
    run = records.read(folder)
    finished = run.end is not None and run.end["status"] == "finished"
    return run if finished and run.header.get("config_hash") == config.hash else None


def begin_records(
    config: TrainConfig,
    folder: Path,
    data: RunData,
    command: str | None,
    state: dict[str, Any] | None,
    group: Group,
    first: Callable[[], dict[str, Any]] | None,
) -> None:
    """Writes the header, and the first checkpoint if checkpoints are kept.

    With a checkpoint `state`, cuts off the lines written after it: they will be written again.
    """
    if state is not None:
        truncate_records(folder / records.FILE, state["records_size"])
        return
    records.begin(folder, header(config, folder, data, command, group))
    if first is not None:
        checkpoint.save(folder, first())


def go_on(training: Any, state: dict[str, Any]) -> None:
    """Puts a `Training` back to a checkpoint's state.

    Raises:
        CheckpointError: for a state of other data, or of another version's shapes.
    """
    check_same_data(state, training.problem.checksum)
    try:
        training.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise checkpoint.CheckpointError(
            "checkpoint: must have been written by this version of gaf and by the same task; "
            f"{type(error).__name__}: {first_line(error)}. Start again in another folder."
        ) from error


def check_same_data(state: dict[str, Any], found: str) -> None:
    """Refuses to go on with training data of another checksum. Older checkpoints have none."""
    if state.get("data", found) != found:
        raise checkpoint.CheckpointError(
            "checkpoint: must go on with the training data that it began with, of checksum "
            f"{state['data']}; the task now gives {found}. Put the data back, or start again in "
            "another folder."
        )


def truncate_records(path: Path, size: int) -> None:
    """Cuts the records off at the size that they had when the checkpoint was written."""
    found = path.stat().st_size
    if found < size:
        raise checkpoint.CheckpointError(
            f"{path}: must hold the {size:,} bytes that the checkpoint goes on from; "
            f"it has {found:,}. "
            "It was cut off or replaced: put it back, or start again in another folder."
        )
    os.truncate(path, size)


def header(
    config: TrainConfig, folder: Path, data: RunData, command: str | None, group: Group
) -> dict[str, Any]:
    what = {
        "kind": "run",
        "name": folder.name,
        "arm": config.arm,
        "config": config.plain(),
        "config_hash": config.hash,
        "command": command,
        "score": dataclasses.asdict(data.score),
        "data": data.checksum,
    }
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    where = {
        "versions": environment.versions(),
        "machine": environment.machine(data.device),
        "commit": environment.commit(),
        "started": started,
    }
    return what | where | {"ranks": group.world, "launch": launch()}
