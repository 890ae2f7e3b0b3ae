"""The tables of docs/choosing-tau.md are those of the records in results/choosing-tau.jsonl.

`python tests/test_choosing_tau.py` prints them anew.
"""

import json
from functools import cache
from pathlib import Path

import pytest

import gaf
from gaf_lab.records import packs
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import Arm, group_by_arm
from test_reproduction import gap, spelled

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "choosing-tau.md"
TASKS = ("mnist5k", "fashion-mnist", "cifar100")
SIZES = (20, 100)
AUTO = "GAF, moving-average 0.05"


@cache
def runs() -> list[Run]:
    return packs.read(ROOT / "results" / "choosing-tau.jsonl")


def at(task: str, b: int, rate: float) -> dict[str, Arm]:
    wanted = {"dataset": task, "b": b, "noise_rate": rate}
    found = group_by_arm(
        run for run in runs() if {key: run.header["config"][key] for key in wanted} == wanted
    )
    return {arm.name: arm for arm in found}


def accuracies(rate: float, measure: measures.Measure) -> str:
    """Every arm at a noise level: a column for each task and micro-batch size."""
    columns = [(task, b) for task in TASKS for b in SIZES]
    lines = [
        "| arm | " + " | ".join(f"{task}, b = {b}" for task, b in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in at(*columns[0], rate):
        lines.append(
            f"| {name} | "
            + " | ".join(spelled(at(task, b, rate)[name], measure) for task, b in columns)
            + " |"
        )
    return "\n".join(lines)


def auto() -> str:
    """The recommended threshold against averaging, and against the fixed tau that was best there, which nobody knows beforehand."""
    lines = [
        "| task | b | label noise | auto - averaging, last | best fixed tau | auto - best fixed, last |",
        "|---" * 6 + "|",
    ]
    for rate in (0.4, 0.0):
        for task in TASKS:
            for b in SIZES:
                arms = at(task, b, rate)
                fixed = {
                    name: arm
                    for name, arm in arms.items()
                    if name.startswith("tau") and "," not in name
                }
                best = max(fixed, key=lambda name: mean(fixed[name]))
                differences = (
                    gap(arms[AUTO], arms["averaging"], measures.LAST),
                    gap(arms[AUTO], arms[best], measures.LAST),
                )
                lines.append(
                    f"| {task} | {b} | {100 * rate:.0f}% | {differences[0]} | {best[4:]} | {differences[1]} |"
                )
    return "\n".join(lines)


def mean(arm: Arm) -> float:
    found = st.spread_over_seeds(arm, measures.LAST)
    assert found is not None
    return found.mean


def agreement() -> str:
    """What two micro-gradients have in common while averaging trains, against how their cosine scatters by chance."""
    lines, task = (
        [
            "| task | b | after steps | mean cosine | scatter, 1 / sqrt(d_eff) | ratio |",
            "|---" * 6 + "|",
        ],
        "",
    )
    for line in map(json.loads, (ROOT / "results" / "agreement.jsonl").read_text().splitlines()):
        if line["kind"] == "conditions":
            task = line["config"]["dataset"]
        elif line["m"] == 1:
            cosine, scatter = 1 - line["distance_mean"], line["dimension"] ** -0.5
            lines.append(
                f"| {task} | {line['b']} | {line['after']} | {cosine:.3f} | {scatter:.3f} | {cosine / scatter:.1f} |"
            )
    return "\n".join(lines)


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
                arms = at(task, b, rate)
                assert len(arms) == 12
                assert all(sorted(arm.seeds) == [0, 1, 2] for arm in arms.values())
    assert {measures.status(run) for run in runs()} == {"finished"}


def test_auto_is_the_one_that_the_page_recommends():
    assert repr(gaf.GAF("auto").tau).startswith("MovingAverageTau(margin=0.05,")


if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"\n{name}\n\n{table()}")
