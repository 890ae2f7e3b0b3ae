"""What `gaf audit` reports: samples.csv, the table of the scores, and a closing paragraph."""

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from gaf_lab.experiments.audit_result import AuditLine, AuditResult
from gaf_lab.records.output import replace_whole
from gaf_lab.training.weighing import SEPARATED

FIRST_SHOWN = 5  # samples on the console
SCORES = {
    "quality": "label quality",
    "loss": "mean loss",
    "disagreement": "share of visits at which another class was nearer",
}


def write_samples(found: AuditResult, path: Path) -> None:
    """Writes a line per judged sample, the most suspect first; index is the data set's own.

    true_label and flipped are empty if no label is known to be wrong. If the task names classes
    and samples, these follow: given_class, predicted_class and sample.
    """
    known, unknown = bool(found.flipped.any()), [""] * len(found.index)
    columns: dict[str, Sequence[object]] = {
        **found.report,
        "index": found.origin,
        "is_label_issue": [int(issue) for issue in found.report["is_label_issue"]],
        "true_label": found.truth if known and found.problem.classes else unknown,
        "flipped": found.flipped.int().tolist() if known else unknown,
        **named_columns(found),
    }
    with replace_whole(path) as part, part.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        for row in found.order:
            values = [column[row] for column in columns.values()]
            out.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def named_columns(found: AuditResult) -> dict[str, Sequence[object]]:
    """The names that the task gives: of each sample's given and predicted class, and its own."""
    columns: dict[str, Sequence[object]] = {}
    if found.problem.problem.class_names and "predicted_label" in found.report:
        for which in ("given", "predicted"):
            labels = found.report[f"{which}_label"]
            columns[f"{which}_class"] = [found.name_class(label) for label in labels]
    return columns | ({"sample": found.samples} if found.samples else {})


def first_suspects(found: AuditResult) -> Table | None:
    """The first samples of the list by name; None if the task names none."""
    columns = named_columns(found)
    if "sample" not in columns:
        return None
    result = Table(title="The first suspects", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("sample", overflow="fold")
    titles = {"given_class": "given label", "predicted_class": "predicted label"}
    shown = {title: columns[name] for name, title in titles.items() if name in columns}
    for title in shown:
        result.add_column(title)
    result.add_column("label quality", justify="right")
    for row in found.order[:FIRST_SHOWN]:
        cells = [str(values[row]) for values in (found.samples, *shown.values())]
        result.add_row(*map(escape, cells), f"{float(found.quality[row]):.3f}")
    return result


def with_truth(lines: Sequence[AuditLine]) -> list[AuditLine]:
    """The lines of runs in which it is known which labels are wrong."""
    return [line for line in lines if line["auroc"]["quality"] is not None]


def table(lines: Sequence[AuditLine]) -> Table:
    """How well each score finds the wrong labels. lines: with truth."""
    result = Table(title="Wrong labels found", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("score", "AUROC", "first 100", "n"):
        result.add_column(column, justify="left" if column == "score" else "right")
    for name in lines[0]["auroc"]:
        cells = [
            mean_and_deviation([line[of][name] for line in lines]) for of in ("auroc", "first100")
        ]
        result.add_row(SCORES[name], *cells, str(len(lines)))
    return result


def mean_and_deviation(values: Sequence[float]) -> str:
    """0.987 ± 0.001; of one value, the value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def closing_words(lines: Sequence[AuditLine]) -> str:
    """How good samples.csv is, beside the mean loss, and what is_label_issue marks.

    Averages over the seeds.
    """
    marked = statistics.fmean(line["issues"]["count"] for line in lines)
    found = words_on_ranking(lines, marked)
    if marked:
        found += words_on_marks(lines) + doubt_of_marks(lines, marked)
    if len(lines) == 1:
        return found
    return f"{found} These are means of {len(lines)} seeds; samples.csv is of the first one alone."


def words_on_marks(lines: Sequence[AuditLine]) -> str:
    """A sentence on how far the marked stand apart, unless prototypes did not judge."""
    apart = [line["separation"] for line in lines if line.get("separation") is not None]
    if not apart:
        return ""
    mean = statistics.fmean(apart)
    if mean >= SEPARATED:
        return f" The scores of the marked stand apart from the others' (separation {mean:.3f})."
    return (
        " The scores of the marked do not stand apart from the others' "
        f"(separation {mean:.3f}, below {SEPARATED}): "
        "few labels are wrong, or the features are too weak to tell."
    )


def doubt_of_marks(lines: Sequence[AuditLine], marked: float) -> str:
    """A sentence if is_label_issue marks over half of the samples."""
    samples = statistics.fmean(line["samples"] for line in lines)
    if 2 * marked <= samples:
        return ""
    return (
        f" The marked are {100 * marked / samples:.0f}% of all: over half mostly means that the "
        "features do not tell the classes apart: go by the ranking, and train longer (--passes)."
    )


def words_on_ranking(lines: Sequence[AuditLine], marked: float) -> str:
    known = with_truth(lines)
    if not known:
        return (
            "samples.csv is ranked by label quality. It is not known which labels are wrong, "
            f"so the ranking cannot be checked. is_label_issue marks {count_lines(marked)}."
        )
    auroc = {
        name: statistics.fmean(line["auroc"][name] for line in known)
        for name in ("quality", "loss")
    }
    first = statistics.fmean(line["first100"]["quality"] for line in known)
    return (
        f"samples.csv is ranked by label quality: AUROC {auroc['quality']:.3f}; "
        f"{100 * first:.0f}% of the first 100 labels are wrong. "
        f"The mean loss has {auroc['loss']:.3f}. "
        f"{describe_issues(marked, [line['issues'] for line in known])}"
    )


def count_lines(number: float) -> str:
    """ "1 line", "2 lines"."""
    return "1 line" if round(number) == 1 else f"{number:.0f} lines"


def describe_issues(marked: float, issues: Sequence[dict[str, float | None]]) -> str:
    """What is_label_issue marks, and how many of the marked are wrong and of the wrong marked."""
    precisions = [each["precision"] for each in issues if each["precision"] is not None]
    recalls = [each["recall"] for each in issues if each["recall"] is not None]
    if not precisions:
        return "is_label_issue marks no line."
    return (
        f"is_label_issue marks {count_lines(marked)}. "
        f"{100 * statistics.fmean(precisions):.0f}% of these are wrong. "
        f"They hold {100 * statistics.fmean(recalls):.0f}% of all wrong labels."
    )
