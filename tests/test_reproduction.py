"""The tables of docs/reproduction.md are those of the records in results/.

`python tests/test_reproduction.py` prints them anew.
"""

import itertools
from functools import cache
from pathlib import Path

import pytest

from gaf_lab.paper.plans import make_plan
from gaf_lab.records import packs
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import Arm, group_by_arm
from gaf_lab.report.measures import Measure
from helpers.tables import by_name, percent, points_between, table, with_deviation

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reproduction.md"
COLUMNS = (
    measures.SELECTED,
    measures.LAST,
    measures.MEMORISED,
    measures.ACCEPTANCE,
    measures.STEPS_TAKEN,
)


@cache
def runs(name: str) -> list[Run]:
    return packs.read_pack(ROOT / "results" / f"{name}-small.jsonl")


def runs_at(name: str, field: str, value: object) -> list[Run]:
    return [run for run in runs(name) if run.header["config"][field] == value]


def values_of(name: str, field: str) -> list[float]:
    return sorted({run.header["config"][field] for run in runs(name)})


def accuracies(rate: float) -> str:
    """Every arm of table 1 at a noise level."""
    arms = group_by_arm(runs_at("table1", "noise_rate", rate))
    return table(
        "arm | n | selected | last | memorised | accepted | steps taken",
        ([arm.name, len(arm.seeds), *(percent(arm, m) for m in COLUMNS)] for arm in arms),
    )


def gaps(rate: float) -> str:
    """GAF against every other arm, paired."""
    arms = by_name(runs_at("table1", "noise_rate", rate))
    gaf = arms.pop("GAF")
    rows = []
    for name, arm in arms.items():
        found = (points_between(gaf, arm, m) for m in (measures.SELECTED, measures.LAST))
        rows.append([name, len(arm.seeds), *found])
    return table("GAF - | n | selected | last", rows)


def sizes() -> str:
    """Figure 4: mean distances at each micro-batch size, over the run and its last interval."""
    rows = []
    for b in values_of("fig4", "b"):
        arm = group_by_arm(runs_at("fig4", "b", b))[0]
        ends = [run.evals[-1] for run in arm.runs]
        whole = spread(map(mean_distance, arm.runs))
        late = spread(line["distance_mean"] for line in ends)
        scales = [line["noise_scale"] for line in ends if line["noise_scale"] is not None]
        scale = f"{spread(scales).mean:,.0f}" if scales else "-"
        rows.append([b, whole.n, distance(whole), distance(late), scale])
    head = "b | n | mean distance, whole run | mean distance, last interval | noise scale B, last"
    return table(head, rows)


def spread(values) -> st.Spread:
    found = st.Spread.of(map(float, values))
    assert found is not None
    return found


def distance(found: st.Spread) -> str:
    return with_deviation(found, 1, 3)


def mean_distance(run: Run) -> float:
    """Over all steps of a run: intervals weigh as many steps as they have."""
    steps = [0, *(line["step"] for line in run.evals)]
    weights = [after - before for before, after in itertools.pairwise(steps)]
    total = sum(w * line["distance_mean"] for w, line in zip(weights, run.evals, strict=True))
    return total / sum(weights)


def courses(name: str) -> str:
    """Distances along the runs of a figure, and accuracies at their end."""
    head = (
        "data | arm | n | distance, first | lowest | last | test accuracy, last (%)"
        " | training accuracy, last (%) | accepted (%)"
    )
    known = Measure(
        "clean", "clean", "share", lambda run: measures.last_value(run, "clean_accuracy")
    )
    rows = []
    for data in dict.fromkeys(run.header["config"]["dataset"] for run in runs(name)):
        for arm in group_by_arm(runs_at(name, "dataset", data)):
            tracks = [distances(run) for run in arm.runs]
            ends = (spread(map(pick, tracks)) for pick in (first, min, last))
            rest = (percent(arm, m) for m in (measures.LAST, known, measures.ACCEPTANCE))
            rows.append([data, arm.name, len(arm.seeds), *map(distance, ends), *rest])
    return table(head, rows)


def distances(run: Run) -> list[float]:
    found = (line["distance_mean"] for line in run.evals)
    return [float(value) for value in found if value is not None]


def first(track: list[float]) -> float:
    return track[0]


def last(track: list[float]) -> float:
    return track[-1]


def along(name: str, field: str, measure: Measure, form: str, head: str) -> str:
    """GAF, averaging and the controls at every value of a field, and their paired differences."""
    names = ("averaging", "GAF", "random skip", "random subset")
    rows = []
    for value in values_of(name, field):
        arms = by_name(runs_at(name, field, value))
        assert all(len(arms[arm].seeds) == 3 for arm in names)
        cells = (percent(arms[arm], measure) for arm in names)
        others = (arms["averaging"], arms["random subset"])
        found = (points_between(arms["GAF"], other, measure) for other in others)
        rows.append([format(value, form), *cells, *found])
    return table(f"{head} | {' | '.join(names)} | GAF - averaging | GAF - random subset", rows)


def shares(name: str, field: str, form: str, head: str) -> str:
    """What GAF accepts at every value of a field, and what it and averaging memorise."""
    rows = []
    for value in values_of(name, field):
        arms = by_name(runs_at(name, field, value))
        accepted, taken, memorised = (
            percent(arms["GAF"], measure)
            for measure in (measures.ACCEPTANCE, measures.STEPS_TAKEN, measures.MEMORISED)
        )
        plain = percent(arms["averaging"], measures.MEMORISED)
        rows.append([format(value, form), accepted, taken, memorised, plain])
    return table(f"{head} | accepted | steps taken | memorised, GAF | memorised, averaging", rows)


def memorising() -> str:
    """Figure 8 along its runs: every fourth evaluation."""
    head = (
        "steps | memorised, averaging | memorised, GAF | accepted, GAF | steps taken, GAF"
        " | mean distance, GAF"
    )
    rows = []
    averaging, gaf = (arm.runs[0].evals[1::4] for arm in group_by_arm(runs("fig8")))
    for a, g in zip(averaging, gaf, strict=True):
        found = (a["memorised"], g["memorised"], g["acceptance"])
        cells = (f"{100 * share:.0f}" for share in found)
        rows.append([a["step"], *cells, g["steps_taken"], f"{g['distance_mean']:.3f}"])
    return table(head, rows)


def thresholds() -> str:
    """Figure 7; averaging is tau = 2."""
    rows = []
    for tau in values_of("fig7", "tau"):
        arm: Arm = group_by_arm(runs_at("fig7", "tau", tau))[0]
        rows.append([f"{tau:g}", len(arm.seeds), *(percent(arm, m) for m in COLUMNS)])
    return table("tau | n | selected | last | memorised | accepted | steps taken", rows)


BY_NOISE, BY_SIZE = ("fig6", "noise_rate"), ("fig9", "b")
TABLES = {
    "table1 0": lambda: accuracies(0.0),
    "table1 40": lambda: accuracies(0.4),
    "table1 60": lambda: accuracies(0.6),
    "gaps 0": lambda: gaps(0.0),
    "gaps 40": lambda: gaps(0.4),
    "gaps 60": lambda: gaps(0.6),
    "fig4": sizes,
    "fig1": lambda: courses("fig1"),
    "fig5": lambda: courses("fig5"),
    "fig8": lambda: courses("fig8"),
    "fig8 course": memorising,
    "fig7": thresholds,
    "fig6 last": lambda: along(*BY_NOISE, measures.LAST, ".0%", "wrong"),
    "fig6 selected": lambda: along(*BY_NOISE, measures.SELECTED, ".0%", "wrong"),
    "fig6 shares": lambda: shares(*BY_NOISE, ".0%", "wrong"),
    "fig9 last": lambda: along(*BY_SIZE, measures.LAST, "d", "b"),
    "fig9 selected": lambda: along(*BY_SIZE, measures.SELECTED, "d", "b"),
    "fig9 shares": lambda: shares(*BY_SIZE, "d", "b"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_the_records(name):
    assert TABLES[name]() in PAGE.read_text()


@pytest.mark.parametrize("name", ["table1", "fig1", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9"])
def test_the_records_are_finished_runs_of_the_figures_plan(name):
    planned = {
        config.hash for config in make_plan(name, "small", seeds=1 if name == "fig8" else None)
    }
    assert {run.header["config_hash"] for run in runs(name)} == planned
    assert {measures.status(run) for run in runs(name)} == {"finished"}


if __name__ == "__main__":
    for name, table in TABLES.items():
        try:
            print(f"\n{name}\n\n{table()}")
        except (FileNotFoundError, ValueError) as error:
            print(f"\n{name}: {error}")
