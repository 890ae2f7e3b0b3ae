"""Saving a run so that it goes on bit for bit: written to a temporary name and renamed, so that a kill loses nothing."""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from gaf_lab.records import run as records
from gaf_lab.settings.checks import first_line
from gaf_lab.settings.config import LATER, TrainConfig

FILE = "checkpoint.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used."""


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Replaces the folder's checkpoint; whatever goes wrong, the one before stays whole.

    Raises:
        CheckpointError: where the disk is full or the folder cannot be written.
    """
    path, temporary = folder / FILE, folder / (FILE + ".part")
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
        kept = (
            f"The checkpoint before it is whole: go on from there with --resume {folder}"
            if path.exists()
            else "There is none before it"
        )
        size = len(buffer.getbuffer()) / 2**20
        raise CheckpointError(
            f"checkpoint {path}: must be written ({size:.1f} MiB); {error.strerror}. {kept}, once there is space."
        ) from None
    return path


def find_checkpoint(folder: Path) -> Path:
    """The folder's checkpoint; CheckpointError where there is none."""
    path = folder / FILE
    if not path.is_file():
        elsewhere = ", in another folder" if (folder / records.FILE).is_file() else ""
        raise CheckpointError(
            f"checkpoint {path}: must exist to resume; it does not. Start the run without --resume{elsewhere}."
        )
    return path


def load(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The folder's checkpoint, read without running any code in it.

    Raises:
        CheckpointError: where there is none, it is damaged, or it belongs to another config.
    """
    path = find_checkpoint(folder)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["config_hash"]
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path}: must be whole; it cannot be read ({first_line(error)}). Start again in another folder."
        ) from None
    if found != config.hash:
        seen = differing(folder, found, config) or f"it has hash {found}, this config {config.hash}"
        raise CheckpointError(f"checkpoint {path}: must be of the same config; {seen}. "
                              "Resume with the config in the folder's records.jsonl, or start in another folder.")  # fmt: skip
    return state


def differing(folder: Path, found: str, config: TrainConfig) -> str:
    """The fields in which the config in the folder's records, of hash `found`, differs; empty where the records do not have it."""
    try:
        header = records.read(folder).header
    except ValueError:
        return ""
    if header.get("config_hash") != found:
        return ""
    there, here = LATER | header["config"], config.plain()
    # as hashed: 1 is not 1.0
    names = [
        n
        for n in here | there
        if n != "label" and json.dumps(there.get(n)) != json.dumps(here.get(n))
    ]
    return ", ".join(
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names
    )
