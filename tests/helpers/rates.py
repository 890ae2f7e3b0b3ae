"""A search for a learning rate, as the pages of docs/ show it."""

from collections.abc import Iterable

from gaf_lab.records.run import Run
from gaf_lab.report import measures

Search = dict[float, float | None]


def search(runs: Iterable[Run]) -> Search:
    """By rate the best held-out accuracy of a run, mean over seeds; None where one diverged."""
    found: dict[float, list[float]] = {}
    diverged = set()
    for run in runs:
        rate = run.header["config"]["lr"]
        if measures.status(run) != "finished":
            diverged.add(rate)
        best = max(line["heldout_accuracy"] for line in run.evals) if run.evals else 0.0
        found.setdefault(rate, []).append(best)
    return {
        rate: None if rate in diverged else sum(values) / len(values)
        for rate, values in sorted(found.items())
    }


def best_of(found: Search) -> float:
    """The rate of the highest accuracy; of equals the lowest."""
    known = {rate: value for rate, value in found.items() if value is not None}
    return min(known, key=lambda rate: (-round(known[rate], 4), rate))


def as_text(found: Search) -> str:
    """ "0.001: 97.2, 0.003: -": in %, - where a run diverged."""
    shown = {rate: "-" if value is None else f"{100 * value:.1f}" for rate, value in found.items()}
    return ", ".join(f"{rate:g}: {value}" for rate, value in shown.items())
