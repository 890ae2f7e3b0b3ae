"""Packs: many runs in one small file, kept beside the code.

A pack has every number of the evaluations, without the rows of single steps. Its first line holds
what most runs share: {"kind": "pack", "config": {...}, "versions": {...}, "machine": {...},
"commit"}. A line per run follows: {"kind": "packed", "name", "arm", "config_hash", ..., "config":
{what differs}, "evals": {key: [one value per evaluation]}, "end"}. `gaf report FILE` reads a pack
as it reads folders.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gaf_lab.records.output import replace_whole
from gaf_lab.records.run import Run, as_json

SHARED_KEYS = ("config", "versions", "machine", "commit", "command")
DIGITS = 5
SAME = object()  # a value that does not differ from the shared one


def write_pack(runs: Sequence[Run], path: Path) -> None:
    """Packs runs, in their order. Numbers keep five significant digits.

    Raises:
        ValueError: without runs.
    """
    if not runs:
        raise ValueError(f"pack {path}: must have at least one run; got none.")
    runs = [replace(run, header=with_short_replay(run.header)) for run in runs]
    shared = {key: most_common([run.header.get(key) for run in runs]) for key in SHARED_KEYS}
    lines = [{"kind": "pack", **shared}, *(pack_run(run, shared) for run in runs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_whole(path) as part:
        part.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_pack(path: Path) -> list[Run]:
    """The runs of a pack.

    Raises:
        ValueError: if the file is no pack.
    """
    try:
        shared, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (ValueError, UnicodeDecodeError):
        shared, lines = {}, []
    if not isinstance(shared, dict) or shared.get("kind") != "pack":
        raise ValueError(
            f"{path}: must be a pack of runs, whose first line is of kind 'pack'; it is not. "
            "Give a folder of runs, or a file of results/."
        )
    return [unpack_run(line, shared, path) for line in lines]


def most_common(values: list[Any]) -> Any:
    """The most frequent value; for tables, the most frequent value of each key."""
    if all(isinstance(value, dict) for value in values):
        return {key: most_common([value.get(key) for value in values]) for key in values[0]}
    return json.loads(Counter(json.dumps(value) for value in values).most_common(1)[0][0])


def pack_run(run: Run, shared: dict[str, Any]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    for key, value in run.header.items():
        own = difference_from(value, shared[key]) if key in SHARED_KEYS else value
        if own is not SAME:
            header[key] = own
    keys = dict.fromkeys(key for line in run.evals for key in line if key not in ("kind", "rows"))
    evals = {key: [round_number(line.get(key)) for line in run.evals] for key in keys}
    return header | {"kind": "packed", "evals": evals, "end": run.end}


def with_short_replay(header: dict[str, Any]) -> dict[str, Any]:
    """The header, whose replayed run is named without where its folder was on that machine."""
    config = header.get("config", {})
    if not config.get("replay"):
        return header
    return header | {"config": config | {"replay": Path(config["replay"]).name}}


def difference_from(value: Any, shared: Any) -> Any:
    """The part of a value that differs from the shared one, or SAME."""
    if not (isinstance(value, dict) and isinstance(shared, dict)):
        return SAME if json.dumps(value) == json.dumps(shared) else value
    own = {}
    for key, item in value.items():
        if key not in shared or json.dumps(item) != json.dumps(shared[key]):
            own[key] = item
    return own or SAME


def unpack_run(line: dict[str, Any], shared: dict[str, Any], path: Path) -> Run:
    columns, end = line.pop("evals"), line.pop("end")
    header = {key: merge(shared[key], line.get(key)) for key in SHARED_KEYS}
    header |= {key: value for key, value in line.items() if key not in SHARED_KEYS}
    rows = zip(*columns.values(), strict=True)
    evals = [{"kind": "eval", **dict(zip(columns, row, strict=True))} for row in rows]
    return Run(path.parent / str(line.get("name")), header | {"kind": "run"}, evals, end)


def merge(shared: Any, own: Any) -> Any:
    if isinstance(shared, dict):
        return shared | (own or {})
    return shared if own is None else own


def round_number(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else as_json(value)
