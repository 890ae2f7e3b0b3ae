"""What `gaf audit` reports: samples.csv, the table of the scores, and a closing paragraph."""

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from gaf_lab.experiments.audit_result import AuditLine, AuditResult
from gaf_lab.records import run as records
from gaf_lab.report.statistics import bootstrap

SCORES = {
    "quality": "label quality, mean over evaluations",
    "loss": "loss, mean over evaluations",
    "loss_selected": "loss, at the selected evaluation",
    "loss_averaging": "loss, mean over evaluations, plain averaging",
    "distance": "distance, this filter",
    "rejection": "rejection, this filter",
}
RANKING = "quality"  # of samples.csv; results/audit.jsonl has what it finds, and the others


def write_samples(found: AuditResult, path: Path) -> None:
    """Writes a line per training sample, the most suspect first; index is the data set's own.

    true_label and flipped are empty if no label is known to be wrong.
    """
    known = bool(found.flipped.any())
    train = found.problem.train
    others = [name for name in SCORES if name != RANKING]
    with records.replace_whole(path) as part, part.open("w", newline="") as file:
        out = csv.writer(file)
        given = ["index", "given_label", "predicted_label", "label_quality", "is_label_issue"]
        out.writerow([*given, *others, "appearances", "true_label", "flipped"])
        for i in found.order:
            row = [
                int(found.problem.origin[i]),
                int(train.observed[i]),
                int(found.predicted[i]),
                f"{float(found.quality[i]):.6g}",
                int(found.issues[i]),
                *(f"{float(found.scores[name][i]):.6g}" for name in others),
                int(found.appearances[i]),
            ]
            truth = [int(train.clean[i]), int(found.flipped[i])] if known else ["", ""]
            out.writerow([*row, *truth])


def with_truth(lines: Sequence[AuditLine]) -> list[AuditLine]:
    """The lines of runs in which it is known which labels are wrong."""
    return [line for line in lines if line["auroc"][RANKING] is not None]


def table(lines: Sequence[AuditLine]) -> Table:
    """How well each score finds the wrong labels. lines: with truth."""
    result = Table(title="Wrong labels found", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("way", "AUROC", "precision", "n"):
        result.add_column(column, justify="left" if column == "way" else "right")
    for name, title in SCORES.items():
        auroc = mean_and_deviation([line["auroc"][name] for line in lines])
        precision = mean_and_deviation([line["precision"][name] for line in lines])
        result.add_row(title, auroc, precision, str(len(lines)))
    return result


def mean_and_deviation(values: Sequence[float]) -> str:
    """0.987 ± 0.001; of one value, the value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def closing_words(lines: Sequence[AuditLine]) -> str:
    """How good samples.csv is, beside the usual way; what is_label_issue marks; the filter's own.

    Averages over the seeds.
    """
    marked = statistics.fmean(line["issues"]["count"] for line in lines)
    known = with_truth(lines)
    if not known:
        return (
            "samples.csv is ranked by label quality. It is not known which labels are wrong, "
            "so the ranking cannot be checked. "
            f"is_label_issue marks the first {marked:.0f} lines."
        )
    return (
        f"samples.csv is ranked by label quality: AUROC {mean_auroc(known, RANKING):.3f}. "
        "The mean loss of plain averaging, the usual way, "
        f"has {mean_auroc(known, 'loss_averaging'):.3f}, {describe_lead(known)}. "
        f"{describe_issues(marked, [line['issues'] for line in known])} "
        f"The filter's own distance has {mean_auroc(known, 'distance'):.3f}."
    )


def mean_auroc(lines: Sequence[AuditLine], name: str) -> float:
    return statistics.fmean(line["auroc"][name] for line in lines)


def describe_lead(lines: Sequence[AuditLine]) -> str:
    """How much more or less AUROC the usual way has; with its interval over several seeds."""
    leads = usual_lead(lines)
    # The difference of the values as they are shown.
    usual, ranking = (round(mean_auroc(lines, name), 3) for name in ("loss_averaging", RANKING))
    text = f"so {abs(usual - ranking):.3f} {'more' if usual > ranking else 'less'}"
    if usual == ranking:
        text = "which is the same"
    if len(leads) == 1:
        return text
    low, high = bootstrap(leads)
    return f"{text} (95% interval over {len(leads)} seeds: {low:+.3f} to {high:+.3f})"


def usual_lead(lines: Sequence[AuditLine]) -> "np.ndarray[Any, Any]":
    """AUROC of the mean loss under plain averaging less that of label quality, by seeds."""
    return np.array([line["auroc"]["loss_averaging"] - line["auroc"][RANKING] for line in lines])


def describe_issues(marked: float, issues: Sequence[dict[str, float | None]]) -> str:
    """What is_label_issue marks, and how many of the marked are wrong and of the wrong marked."""
    precisions = [each["precision"] for each in issues if each["precision"] is not None]
    recalls = [each["recall"] for each in issues if each["recall"] is not None]
    if not precisions:
        return "is_label_issue marks no line."
    return (
        f"is_label_issue marks the first {marked:.0f} lines. "
        f"{100 * statistics.fmean(precisions):.0f}% of these are wrong. "
        f"They hold {100 * statistics.fmean(recalls):.0f}% of all wrong labels."
    )
