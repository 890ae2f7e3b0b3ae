"""A run's records: a folder with `records.jsonl`, and the only source of figures and tables.

The file has a header line, then a line for each evaluation, then an end line.

header: {"kind": "run", "name", "arm", "config": {...}, "config_hash", "command",
         "score": {"name", "key", "higher", "share"}, "data",
         "versions": {...}, "machine": {...}, "commit", "started", "ranks", "launch"}
eval:   {"kind": "eval", "step", "steps_taken", "samples", "passes", "seconds", "lr", "train_loss",
         "acceptance", "distance_mean", "distance_min", "distance_pairs", "noise_scale",
         "norm_dispersion", "heldout_accuracy", "heldout_loss", "test_accuracy", "test_loss",
         "memorised", "corrected", "clean_accuracy", "samples_per_second", "rows": [...]}
end:    {"kind": "end", "status": "finished" | "stopped" | "interrupted" | "diverged", "seconds"}

Accuracies and shares are in [0, 1]. A value that does not exist is null.
samples, passes: of what was drawn, skipped steps included.
seconds: in training and evaluation, over all parts of a resumed run.
memorised, corrected: of the training samples with a flipped label, the share predicted as the wrong
    label, and as the true label; null without flips.
rarest_accuracy: on the test pictures of the last class; only under `imbalance`.
own_test_accuracy, own_heldout_accuracy: of the weights themselves, where their average is evaluated
    (`ema`); otherwise there are no such keys.
separation, restarted: after an audit, how far its suspects' scores lay apart
    (`gaf.SampleAgreement.separation`; null where it does not decide), and whether the run started
    again; otherwise there are no such keys.
separation, sample_weight: under `agreement`, how far doubtful scores lie apart in the last steps (1
    for other scores than prototypes), and the mean weight of the last micro-batch's samples.
clean_accuracy: of the other training samples.
acceptance: accepted micro-gradients over all, since the line before; a skipped step has 0.
distance_mean, distance_min: to the running sum of the rows accepted before, since the line before.
    Under averaging the sum holds all rows before, so arms differ in them on the same rows.
distance_pairs: of two micro-gradients, independent of the arm: 1 - |g|^2 / mean |g_i|^2, with |g|^2
    estimated from all compared rows. Older records have B / (b + B), B being `noise_scale`, over
    the last 100 steps.
rows: the accepted rows of each step since the line before, 0 for a skipped step.
step: where steps grow (`until-agreement` and its controls), micro-batches; steps_taken counts the
    optimizer's.
score: what the run is judged by; evaluations have it under "test_" and "heldout_" and its key. A
    task whose targets are no classes has null accuracies; a metric of its own has the key "metric".
    Older records have none: theirs is the accuracy.
data: checksum of the task's training data.
command: the command that runs this again, or null.
ranks: processes that computed the micro-batches. launch: the torchrun command that started them,
    or null.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaf_lab.records.output import replace_whole
from gaf_lab.records.score import Score, score_in

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
    def score(self) -> Score:
        """What the run is judged by."""
        return score_in(self.header)

    @property
    def selected(self) -> dict[str, Any]:
        """The first evaluation with the best score on held-out noisy targets.

        Without held-out samples, the last evaluation.
        """
        score, best = self.score, None
        for line in self.evals:
            value = score.of(line, "heldout")
            if value is not None and (best is None or score.rank(value) > best[0]):
                best = score.rank(value), line
        return self.evals[-1] if best is None else best[1]


def begin(folder: Path, header: dict[str, Any]) -> None:
    """Makes the records with their header, at once: no reader sees a file without one."""
    with replace_whole(folder / FILE) as part:
        part.write_text(as_line(header))


def append(folder: Path, line: dict[str, Any]) -> None:
    with (folder / FILE).open("a") as file:
        file.write(as_line(line))


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(as_json(record), allow_nan=False) + "\n"


def as_json(value: Any) -> Any:
    """The value as JSON has it: NaN and infinities become null, paths text."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def read(folder: Path) -> Run:
    """A finished, running or interrupted run. A last line that was cut off is skipped.

    Raises:
        ValueError: if the folder has no records, or a line other than the last is broken.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: must hold a run, that is a file {FILE}; it does not. "
            "Give the folder that `gaf train --out` wrote."
        )
    parsed = parse_lines(path)
    if not parsed or parsed[0].get("kind") != "run":
        fault = "it is not. Was the file edited?" if path.stat().st_size else "the file is empty."
        raise ValueError(
            f"{path}: the first line must be a header of kind 'run'; {fault} A run whose header "
            "was lost can go on, by `gaf train --resume`, or start anew in another folder."
        )
    evals = [line for line in parsed if line["kind"] == "eval"]
    ends = [line for line in parsed if line["kind"] == "end"]
    return Run(folder, parsed[0], evals, ends[-1] if ends else None)


def parse_lines(path: Path) -> list[dict[str, Any]]:
    """The records in a file, without a broken last line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed: list[dict[str, Any]] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: line {number} must be JSON; it is not ({error.msg}). Was the file edited?"
            ) from None
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(
                f"{path}: line {number} must be a record with a kind; it is not. "
                "Was the file edited?"
            )
        parsed.append(line)
    return parsed
