"""Many runs in one small file, to be kept beside the code: every number of their evaluations, without the rows of single steps.

First line: {"kind": "pack", "config": {...}, "versions": {...}, "machine": {...}, "commit"}, what most runs share; then a line per run,
{"kind": "packed", "name", "arm", "config_hash", ..., "config": {what differs}, "evals": {key: [one value per evaluation]}, "end"}.
`gaf report FILE` reads such a file as it reads folders.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_lab.records.run import Run, plain, whole

SHARED = ("config", "versions", "machine", "commit", "command")
DIGITS = 5


def write(runs: Sequence[Run], path: Path) -> None:
    """Packs runs, in their order. Numbers keep five significant digits.

    Raises:
        ValueError: without runs.
    """
    if not runs:
        raise ValueError(f"pack {path}: must have at least one run; got none.")
    first = {key: common([run.header.get(key) for run in runs]) for key in SHARED}
    lines = [{"kind": "pack", **first}, *(packed(run, first) for run in runs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read(path: Path) -> list[Run]:
    """The runs of a pack.

    Raises:
        ValueError: where the file is no pack.
    """
    try:
        first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    except (ValueError, UnicodeDecodeError):
        first, rest = {}, []
    if not isinstance(first, dict) or first.get("kind") != "pack":
        raise ValueError(f"{path}: must be a pack of runs, whose first line is of kind 'pack'; it is not. Give a folder of runs, "
                         "or a file of results/.")  # fmt: skip
    return [unpacked(line, first, path) for line in rest]


def common(values: list[Any]) -> Any:
    """For tables the most frequent value of each key; else the most frequent value."""
    if all(isinstance(value, dict) for value in values):
        return {key: common([value.get(key) for value in values]) for key in values[0]}
    return json.loads(Counter(json.dumps(value) for value in values).most_common(1)[0][0])


def packed(run: Run, first: dict[str, Any]) -> dict[str, Any]:
    header = {
        key: without(value, first[key]) if key in SHARED else value
        for key, value in run.header.items()
    }
    header = {key: value for key, value in header.items() if value is not SAME} | {"kind": "packed"}
    keys = dict.fromkeys(key for line in run.evals for key in line if key not in ("kind", "rows"))
    return header | {
        "evals": {key: [short(line.get(key)) for line in run.evals] for key in keys},
        "end": run.end,
    }


SAME = object()


def without(value: Any, shared: Any) -> Any:
    """What of a value differs from the shared one."""
    if isinstance(value, dict) and isinstance(shared, dict):
        return {
            key: item
            for key, item in value.items()
            if key not in shared or json.dumps(item) != json.dumps(shared[key])
        } or SAME
    return SAME if json.dumps(value) == json.dumps(shared) else value


def unpacked(line: dict[str, Any], first: dict[str, Any], path: Path) -> Run:
    columns, end = line.pop("evals"), line.pop("end")
    header = {key: together(first[key], line.get(key)) for key in SHARED} | {
        key: v for key, v in line.items() if key not in SHARED
    }
    evals = [
        {"kind": "eval", **dict(zip(columns, values, strict=True))}
        for values in zip(*columns.values(), strict=True)
    ]
    return Run(path.parent / str(line.get("name")), header | {"kind": "run"}, evals, end)


def together(shared: Any, own: Any) -> Any:
    if isinstance(shared, dict):
        return shared | (own or {})
    return shared if own is None else own


def short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else plain(value)
