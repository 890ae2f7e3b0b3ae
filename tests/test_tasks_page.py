"""The tables of docs/tasks.md are those of the records in results/tasks.jsonl.

`python tests/test_tasks_page.py` prints them anew.
"""

from functools import cache
from pathlib import Path

import pytest

from gaf_lab.records import packs
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure, score_measures
from gaf_lab.report.statistics import paired_difference, spread_over_seeds
from helpers.tables import by_name, percent, table, with_deviation

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tasks.md"
ARMS = (
    *("averaging", "GAF", "GAF, start best", "random subset", "random skip"),
    *("Guard", "median", "gradient clipping", "larger batch"),
)
BEST, ITS_SUBSET = "GAF, start best", "random subset of GAF, start best"
SCENARIOS = {"everywhere": "iid", "worker": "sharded"}


@cache
def runs() -> list[Run]:
    return packs.read_pack(ROOT / "results" / "tasks.jsonl")


def arms_of(task: str, scenario: str) -> dict[str, Arm]:
    chosen = [
        run
        for run in runs()
        if run.header["config"]["task"].endswith(f":{task}")
        and run.header["config"]["sampler"] == SCENARIOS[scenario]
    ]
    found = {arm.kind: arm for arm in by_name(chosen).values()}
    return {name: found[name] for name in (*ARMS, ITS_SUBSET) if name in found}


def scores(task: str, scenario: str) -> str:
    """Every arm of a task, and GAF against it."""
    arms, rows = arms_of(task, scenario), []
    score = arms["GAF"].runs[0].score
    last, selected = score_measures(score)
    shown = [last] if spread_over_seeds(arms["GAF"], selected) is None else [selected, last]
    for name, arm in arms.items():
        cells = [value(arm, measure) for measure in shown]
        shares = [percent(arm, m) for m in (measures.ACCEPTANCE, measures.STEPS_TAKEN)]
        gaps = [gap(arms["GAF"], arm, measure) if name != "GAF" else "" for measure in shown]
        rows.append([name, len(arm.seeds), *cells, *shares, *gaps])
    names = [measure.name for measure in shown]
    head = f"arm | n | {' | '.join(names)} | accepted | steps taken | "
    return table(head + " | ".join(f"GAF - it, {name}" for name in names), rows)


def best_start() -> str:
    """GAF from the best start against others, in genres with one bad worker."""
    arms = arms_of("genres", "worker")
    rows = []
    for other in ("averaging", ITS_SUBSET, "median"):
        gaps = (gap(arms[BEST], arms[other], m) for m in (measures.SELECTED, measures.LAST))
        rows.append([f"{BEST} - {other}", *gaps])
    return table("difference | selected | last", rows)


def value(arm: Arm, measure: Measure) -> str:
    if measure.unit == "share":
        return percent(arm, measure)
    found = spread_over_seeds(arm, measure)
    return "-" if found is None else with_deviation(found, 1, digits_of(arm))


def gap(arm: Arm, other: Arm, measure: Measure) -> str:
    found = paired_difference(arm, other, measure)
    assert found is not None
    assert found.low is not None
    scale, digits = (100, 1) if measure.unit == "share" else (1, digits_of(arm))
    low, high = (f"{scale * end:.{digits}f}" for end in (found.low, found.high))
    return f"{scale * found.mean:+.{digits}f} ({low} to {high})"


def digits_of(arm: Arm) -> int:
    """Of a score that is no share: 3 of bits, 1 of a return."""
    return 1 if arm.runs[0].score.higher else 3


MEASURED = [
    *(("speakers", scenario) for scenario in SCENARIOS),
    *(("plays", scenario) for scenario in SCENARIOS),
    *(("genres", scenario) for scenario in SCENARIOS),
    *(("cartpole", scenario) for scenario in SCENARIOS),
    *(("acrobot", scenario) for scenario in SCENARIOS),
]
TABLES = {
    f"{task} {scenario}": lambda task=task, scenario=scenario: scores(task, scenario)
    for task, scenario in MEASURED
} | {"genres worker, best start": best_start}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_the_records(name):
    assert TABLES[name]() in PAGE.read_text()


def test_every_arm_has_finished_runs_with_the_same_seeds():
    for task, scenario in MEASURED:
        arms = arms_of(task, scenario)
        expected = set(ARMS) - ({BEST} if scenario == "everywhere" else set())
        assert set(arms) - {ITS_SUBSET} == expected
        seeds = 10 if (task, scenario) == ("acrobot", "everywhere") else 5
        assert {tuple(arm.seeds) for arm in arms.values()} == {tuple(range(seeds))}
    assert {measures.status(run) for run in runs()} == {"finished"}


if __name__ == "__main__":
    for name, table_of in TABLES.items():
        print(f"\n{name}\n\n{table_of()}")
