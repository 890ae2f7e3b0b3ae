"""The tables of docs/choosing-tau.md are those of the records in results/choosing-tau.jsonl.

`python tests/test_choosing_tau.py` prints them anew.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import gaf
from gaf_lab.records import packs
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report.arms import Arm
from helpers.tables import by_name, mean_of, percent, points_between, table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "choosing-tau.md"
TASKS = ("mnist5k", "fashion-mnist", "cifar100")
SIZES = (20, 100)
PLACES = [(task, b) for task in TASKS for b in SIZES]
AUTO = "GAF, moving-average 0.05"


@cache
def runs() -> list[Run]:
    return packs.read_pack(ROOT / "results" / "choosing-tau.jsonl")


def arms_at(task: str, b: int, rate: float) -> dict[str, Arm]:
    wanted = {"dataset": task, "b": b, "noise_rate": rate}
    return by_name(run for run in runs() if wanted.items() <= run.header["config"].items())


def accuracies(rate: float, measure: measures.Measure) -> str:
    """Every arm at a noise level: a column for each task and micro-batch size."""
    places = [arms_at(*place, rate) for place in PLACES]
    head = " | ".join(["arm", *(f"{task}, b = {b}" for task, b in PLACES)])
    names = places[0]
    return table(
        head, ([name, *(percent(arms[name], measure) for arms in places)] for name in names)
    )


def auto() -> str:
    """The recommended threshold against averaging, and against the best fixed tau.

    The best fixed tau is not known before the runs.
    """
    rows = []
    for rate in (0.4, 0.0):
        for task, b in PLACES:
            arms = arms_at(task, b, rate)
            best = best_fixed(arms)
            gains = (
                points_between(arms[AUTO], arms[other], measures.LAST)
                for other in ("averaging", best)
            )
            over_averaging, over_best = gains
            tau = best.removeprefix("tau ")
            rows.append([task, b, f"{100 * rate:.0f}%", over_averaging, tau, over_best])
    head = (
        "task | b | label noise | auto - averaging, last | best fixed tau | auto - best fixed, last"
    )
    return table(head, rows)


def best_fixed(arms: dict[str, Arm]) -> str:
    fixed = [name for name in arms if name.startswith("tau") and "," not in name]
    return max(fixed, key=lambda name: mean_of(arms[name], measures.LAST))


def agreement() -> str:
    """The mean cosine of two micro-gradients while averaging trains, against its scatter."""
    head = "task | b | after steps | mean cosine | scatter, 1 / sqrt(d_eff) | ratio"
    return table(head, agreement_rows())


def agreement_rows() -> Iterator[list[Any]]:
    task = ""
    for line in map(json.loads, (ROOT / "results" / "agreement.jsonl").read_text().splitlines()):
        if line["kind"] == "conditions":
            task = line["config"]["dataset"]
        elif line["m"] == 1:
            cosine, scatter = 1 - line["distance_mean"], line["dimension"] ** -0.5
            numbers = (f"{cosine:.3f}", f"{scatter:.3f}", f"{cosine / scatter:.1f}")
            yield [task, line["b"], line["after"], *numbers]


TABLES = {
    "last 40": lambda: accuracies(0.4, measures.LAST),
    "selected 40": lambda: accuracies(0.4, measures.SELECTED),
    "last 0": lambda: accuracies(0.0, measures.LAST),
    "accepted 40": lambda: accuracies(0.4, measures.ACCEPTANCE),
    "auto": auto,
    "agreement": agreement,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_the_records(name):
    assert TABLES[name]() in PAGE.read_text()


def test_every_arm_has_three_finished_runs_with_the_same_seeds():
    for task in TASKS:
        for b in SIZES:
            for rate in (0.0, 0.4):
                arms = arms_at(task, b, rate)
                assert len(arms) == 12
                assert all(sorted(arm.seeds) == [0, 1, 2] for arm in arms.values())
    assert {measures.status(run) for run in runs()} == {"finished"}


def test_auto_is_the_one_that_the_page_recommends():
    assert repr(gaf.GAF("auto").tau).startswith("MovingAverageTau(margin=0.05,")


if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"\n{name}\n\n{table()}")
