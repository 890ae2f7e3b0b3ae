"""What a benchmark, a probe or an audit measured, as a file of JSON lines; conditions first."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gaf_lab.records import environment
from gaf_lab.records.output import replace_whole


class Measurement(Protocol):
    """Has a line in such a file."""

    def line(self) -> dict[str, Any]: ...


def write_measurements(
    found: Sequence[Measurement],
    path: Path,
    conditions: dict[str, Any],
    device: torch.device | None = None,
) -> None:
    """Writes the conditions and a line for each measurement.

    The conditions include the load: the processes that wanted the CPU in the last minute, ours
    among them. Above the number of cores, times on the clock are blurred.

    Args:
        found: what was measured.
        path: the file, written anew.
        conditions: the options; versions, machine, load and commit are added.
        device: where it was measured; None: on the CPU.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {
        "versions": environment.versions(),
        "machine": environment.machine(device or torch.device("cpu")),
        "load": os.getloadavg()[0],
        "commit": environment.commit(),
    }
    lines = [{"kind": "conditions", **conditions, **where}, *(each.line() for each in found)]
    with replace_whole(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
