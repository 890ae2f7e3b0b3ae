"""A run's records: one folder, `records.jsonl` in it; a header line, then one line per evaluation, then an end line.

Every figure and table is a function of these files alone.

header: {"kind": "run", "name", "arm", "config": {...}, "config_hash", "versions": {...}, "machine": {...}, "commit", "started",
         "ranks", "launch"}
eval:   {"kind": "eval", "step", "steps_taken", "samples", "passes", "seconds", "lr", "train_loss",
         "acceptance", "distance_mean", "distance_min", "distance_pairs", "noise_scale", "norm_dispersion",
         "heldout_accuracy", "heldout_loss", "test_accuracy", "test_loss",
         "memorised", "corrected", "clean_accuracy", "samples_per_second", "rows": [...]}
end:    {"kind": "end", "status": "finished" | "stopped" | "interrupted" | "diverged", "seconds"}

Accuracies and shares are in [0, 1]; samples and passes count what was drawn, stepped on or not; `seconds` is time in
training and evaluation, resumed runs added up. `memorised`, `corrected`: of the training samples whose label was
flipped, the share predicted as the wrong label, and as the true one; null without flips. `clean_accuracy`: of the
others. `acceptance`, distances: since the line before; acceptance is accepted over all micro-gradients, 0 for a
skipped step. `distance_mean` and `distance_min` are to the running sum of the rows accepted before, under averaging of all rows
before, so that they differ between arms on the same rows. `distance_pairs` is that of two micro-gradients, whatever is done with
them: 1 - |g|^2 / mean |g_i|^2, with |g|^2 estimated from all compared rows. Older records have B / (b + B) for it, B being
`noise_scale`, over the last 100 steps. `ranks`: processes that computed the micro-batches; `launch`: which torchrun command
started them, null without. `rows`: for each step since the line before, how many rows were accepted, 0 for a skip. A value that
does not exist is null.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaf_lab.settings.checks import ConfigError

FILE = "records.jsonl"


@dataclass(frozen=True)
class Run:
    """A run as read back from its folder."""

    folder: Path
    header: dict[str, Any]
    evals: list[dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def arm(self) -> str:
        return str(self.header["arm"])

    @property
    def seed(self) -> int:
        return int(self.header["config"]["seed"])

    @property
    def rows(self) -> list[int]:
        """Rows accepted at each step, 0 for a skip."""
        return [n for line in self.evals for n in line["rows"]]

    @property
    def selected(self) -> dict[str, Any]:
        """The evaluation with the best accuracy on the held-out noisy labels, the earliest of equals; the last without held-out."""
        scored = [line for line in self.evals if line["heldout_accuracy"] is not None]
        return max(scored, key=lambda line: line["heldout_accuracy"]) if scored else self.evals[-1]


def make_folder(folder: Path) -> None:
    """Makes an output folder, and tries whether it can be written; ConfigError where not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try the same folder
    except FileExistsError:
        raise ConfigError(
            f"output folder {folder}: must be a folder; it is a file. Give another one with --out."
        ) from None
    except OSError as error:
        seen = f"it is not ({error.filename}: {error.strerror})"
        raise ConfigError(
            f"output folder {folder}: must be writable; {seen}. Give another one with --out."
        ) from None


def make_file(path: Path) -> None:
    """Makes the folder of an output file, and tries whether the file can be written there; ConfigError where not."""
    if path.is_dir():
        raise ConfigError(
            f"output file {path}: must be a file; it is a folder. Give a file's name in it with --out."
        )
    make_folder(path.parent)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place once it is whole; what goes wrong before leaves what was there."""
    part = path.with_name(
        f".part-{path.name}"
    )  # the ending stays: it names the format of a picture
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def append(folder: Path, line: dict[str, Any]) -> None:
    with (folder / FILE).open("a") as file:
        file.write(json.dumps(plain(line), allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Without what JSON does not know: NaN and infinities become null, paths text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def read(folder: Path) -> Run:
    """A finished, running or interrupted run; a last line that was cut off while being written is left out.

    Raises:
        ValueError: where there are no records in the folder, or a line other than the last is broken.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: must hold a run, that is a file {FILE}; it does not. Give the folder that `gaf train --out` wrote."
        )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed: list[dict[str, Any]] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}: line {number} must be JSON; it is not ({error.msg}). Was the file edited?"
                ) from None
            continue
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(
                f"{path}: line {number} must be a record with a kind; it is not. Was the file edited?"
            )
        parsed.append(line)
    if not parsed or parsed[0].get("kind") != "run":
        raise ValueError(
            f"{path}: the first line must be a header of kind 'run'; it is not. Was the file edited?"
        )
    evals = [line for line in parsed if line["kind"] == "eval"]
    ends = [line for line in parsed if line["kind"] == "end"]
    return Run(folder, parsed[0], evals, ends[-1] if ends else None)
