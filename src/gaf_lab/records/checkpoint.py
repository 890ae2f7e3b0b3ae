"""Checkpoints, from which a run resumes bit for bit.

A checkpoint is written under a temporary name and then renamed, so a kill loses nothing.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from gaf_lab.records import run as records
from gaf_lab.settings.checks import first_line
from gaf_lab.settings.config import LATER, TrainConfig

CHECKPOINT_FILE = "checkpoint.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used."""


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Replaces the folder's checkpoint. If it fails, the one before stays whole.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written.
    """
    path, temporary = folder / CHECKPOINT_FILE, folder / (CHECKPOINT_FILE + ".part")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        size = len(buffer.getbuffer()) / 2**20
        fix = "Start again once there is space."
        if path.exists():
            fix = (
                "The checkpoint before it is whole: "
                f"resume from it with --resume {folder}, once there is space."
            )
        raise CheckpointError(
            f"checkpoint {path}: must be written ({size:.1f} MiB); {error.strerror}. {fix}"
        ) from None
    return path


def find_checkpoint(folder: Path) -> Path:
    """The path of the folder's checkpoint; CheckpointError if there is none."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        elsewhere = ", in another folder" if (folder / records.FILE).is_file() else ""
        raise CheckpointError(
            f"checkpoint {path}: must exist to resume; it does not. "
            f"Start the run without --resume{elsewhere}."
        )
    return path


def load(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The state in the folder's checkpoint, read without running any code in it.

    Raises:
        CheckpointError: if there is none, it is damaged, or it belongs to another config.
    """
    path = find_checkpoint(folder)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["config_hash"]
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path}: must be whole; it cannot be read ({first_line(error)}). "
            "Start again in another folder."
        ) from None
    if found != config.hash:
        hashes = f"it has hash {found}, this config {config.hash}"
        seen = describe_difference(folder, found, config) or hashes
        raise CheckpointError(
            f"checkpoint {path}: must be of the same config; {seen}. "
            "Resume with the config in the folder's records.jsonl, or start in another folder."
        )
    return state


def describe_difference(folder: Path, found: str, config: TrainConfig) -> str:
    """The fields in which the folder's config, of hash `found`, differs from this config.

    Empty if the records do not hold that config.
    """
    try:
        header = records.read(folder).header
    except ValueError:
        return ""
    if header.get("config_hash") != found:
        return ""
    there, here = LATER | header["config"], config.plain()
    names = [n for n in here | there if n != "label" and differ(there.get(n), here.get(n))]
    return ", ".join(
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names
    )


def differ(one: Any, other: Any) -> bool:
    """Whether the hashes of two values differ: 1 is not 1.0."""
    return json.dumps(one) != json.dumps(other)
