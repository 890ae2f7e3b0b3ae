"""What docs/samples.md says was measured is in the records in results/.

`python tests/test_samples_evidence.py` prints the tables. The records are made by
benchmarks/label_detection.py and benchmarks/label_training.py.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gaf_lab.records.packs import read_pack
from gaf_lab.records.run import Run
from helpers.paired import Paired
from helpers.tables import table

ROOT = Path(__file__).parents[1]
DATA = {"mnist5k": "MNIST-5k", "fashion-mnist": "Fashion-MNIST"}
NOISE = {"symmetric": "symmetric", "asymmetric": "class-dependent"}
Lines = list[dict[str, Any]]

# ------------------------------------------------------------------------------------ detection

BEST_OF_FOLDS = 3  # passes, at which the folds find most


def found() -> dict[tuple[str, str, float, str, int], Lines]:
    """The seeds of each data set, noise, rate, way and number of passes."""
    groups: dict[tuple[str, str, float, str, int], Lines] = {}
    text = (ROOT / "results" / "label-detection.jsonl").read_text().splitlines()
    for line in sorted(map(json.loads, text[1:]), key=lambda line: line["seed"]):
        place = (line["dataset"], line["noise"], line["rate"], line["way"], line["passes"])
        groups.setdefault(place, []).append(line)
    return groups


def scores(group: Lines, name: str, measure: str) -> list[float]:
    return [line["scores"][name][measure] for line in group]


def cell(group: Lines | None, name: str, measure: str) -> str:
    return "" if group is None else f"{statistics.mean(scores(group, name, measure)):.3f}"


def along_training() -> str:
    """AUROC over training: each score at the last visit, and over all visits."""
    groups, rows = found(), []
    for data in DATA:
        for noise in NOISE:
            for passes in (1, 3, 6, 12, 24):
                group = groups[data, noise, 0.4, "watched", passes]
                both = [
                    f"{cell(group, name, 'auroc')}, {cell(group, f'history_{name}', 'auroc')}"
                    for name in ("loss", "teacher", "vote", "plain", "prototype")
                ]
                differed = [
                    cell(group, f"history_{name}", "auroc")
                    for name in ("disagreement", "prototype_disagreement")
                ]
                folds = cell(groups.get((data, noise, 0.4, "folds", passes)), "folds", "auroc")
                start = [f"{DATA[data]}, {NOISE[noise]}", passes]
                rows.append([*start, *both, *differed, folds])
    return table(
        "data, noise | passes | loss | teacher | vote | plain prototype | prototype | "
        "the network disagreed | the nearest prototype did | five folds",
        rows,
    )


def by_rate() -> str:
    """AUROC, average precision and precision among the first 100 after 12 passes."""
    groups, rows = found(), []
    for data in DATA:
        for noise, rate in sorted({key[1:3] for key in groups if key[0] == data}, reverse=True):
            group = groups[data, noise, rate, "watched", 12]
            folds = groups.get((data, noise, rate, "folds", BEST_OF_FOLDS))
            if len(group) < 5:
                continue
            cells = [three(group, f"history_{name}") for name in ("loss", "plain", "prototype")]
            counts = [
                round(statistics.mean(line[name] for line in group))
                for name in ("wrong", "issues", "issues_wrong")
            ]
            start = f"{DATA[data]}, {NOISE[noise]} {100 * rate:.0f}%"
            full = folds is not None and len(folds) >= 5
            rows.append([start, *cells, three(folds, "folds") if full else "", *counts])
    return table(
        "data, noise | mean loss | mean plain prototype | mean prototype | "
        "five folds, 3 passes | wrong | issues of `report()` | of these wrong",
        rows,
    )


def three(group: Lines | None, name: str) -> str:
    return ", ".join(cell(group, name, measure) for measure in ("auroc", "ap", "first100"))


def detection_differences() -> str:
    """AUROC of the mean prototype score after 12 passes, less that of others."""
    groups, rows = found(), []
    for data in DATA:
        for noise in NOISE:
            group = groups[data, noise, 0.4, "watched", 12]
            folds = groups[data, noise, 0.4, "folds", BEST_OF_FOLDS]
            own = scores(group, "history_prototype", "auroc")
            others = {
                name: scores(group, f"history_{name}", "auroc")
                for name in ("loss", "teacher", "vote", "plain", "disagreement")
            }
            others["folds"] = scores(folds, "folds", "auroc")
            cells = [Paired.of(own, other).text(3) for other in others.values()]
            rows.append([f"{DATA[data]}, {NOISE[noise]}", *cells])
    return table(
        "data, noise | against mean loss | mean teacher | mean vote | mean plain prototype | "
        "the network disagreed | five folds, 3 passes",
        rows,
    )


def seconds() -> tuple[float, float]:
    """CPU time, in plain trainings of as many passes: of taking all scores, and of the folds."""
    groups = {key: group for key, group in found().items() if key[2] == 0.4}

    def mean(way: str, passes: int) -> float:
        picked = [group for key, group in groups.items() if key[3:] == (way, passes)]
        lines = [line for group in picked for line in group]
        return statistics.mean(line["cpu_seconds"] / line["plain_cpu_seconds"] for line in lines)

    return mean("watched", 24), mean("folds", 12) * 24 / 12


# ------------------------------------------------------------------------------------ training

OURS = "audit, restart with ELR"
SETTINGS = (
    ("asymmetric", 1.0, "iid", "class-dependent 40%"),
    ("symmetric", 1.0, "iid", "symmetric 40%"),
    ("none", 1.0, "iid", "clean"),
    ("none", 50.0, "iid", "long tail 50 : 1"),
    ("symmetric", 1.0, "sharded", "one bad shard of eight"),
)
Cells = dict[str, list[Run]]  # arm -> runs in the order of their seeds


def trained() -> dict[tuple[str, str], Cells]:
    """(data set, setting) -> the arms of which five seeds are finished."""
    names = {setting[:3]: setting[3] for setting in SETTINGS}
    places: dict[tuple[str, str], Cells] = {}
    runs = read_pack(ROOT / "results" / "label-training.jsonl")
    for run in sorted(runs, key=lambda run: run.seed):
        config = run.header["config"]
        name = names[config["noise"], config["imbalance"], config["sampler"]]
        place = places.setdefault((config["dataset"], name), {})
        place.setdefault(run.arm, []).append(run)
    wanted = [(data, setting[3]) for data in DATA for setting in SETTINGS]
    return {
        place: {arm: runs for arm, runs in places[place].items() if len(runs) == 5}
        for place in wanted
        if place in places
    }


def last(run: Run, prefix: str = "", name: str = "test") -> float:
    return float(run.evals[-1][f"{prefix}{name}_accuracy"])


def selected(run: Run, prefix: str = "") -> float:
    """Test accuracy at the first evaluation with the best accuracy on noisy held-out labels."""
    best = max(run.evals, key=lambda line: line[f"{prefix}heldout_accuracy"])
    return float(best[f"{prefix}test_accuracy"])


MEASURES: dict[str, Callable[[Run], float]] = {
    "last": lambda run: last(run, "own_"),
    "last, averaged weights": last,
    "selected": lambda run: selected(run, "own_"),
    "selected, averaged weights": selected,
}


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def accuracy_table() -> str:
    rows = []
    for (data, setting), arms in trained().items():
        for arm, runs in arms.items():
            cells = [spread([measure(run) for run in runs]) for measure in MEASURES.values()]
            rows.append([f"{DATA[data]}, {setting}", arm, *cells])
    return table(f"data, labels | rule | {' | '.join(MEASURES)}", rows)


def training_differences() -> str:
    """Of audit and restart against every other rule, in points."""
    rows = []
    for (data, setting), arms in trained().items():
        for arm, runs in arms.items():
            if arm == OURS or OURS not in arms:
                continue
            cells = [
                Paired.of(*([100 * measure(run) for run in some] for some in (arms[OURS], runs)))
                for measure in (MEASURES["last"], last, selected)
            ]
            rows.append([f"{DATA[data]}, {setting}", arm, *(cell.text(1) for cell in cells)])
    return table(
        "data, labels | audit, restart with ELR, against | last | last, averaged weights | "
        "selected, averaged weights",
        rows,
    )


def rarest_table() -> str:
    """Recall of the rarest class of the long tail."""
    rows = []
    for (data, setting), arms in trained().items():
        for arm, runs in arms.items() if setting.startswith("long tail") else ():
            cells = [
                spread([last(run, prefix, "rarest") for run in runs]) for prefix in ("own_", "")
            ]
            rows.append([DATA[data], arm, *cells])
    return table("data | rule | recall, last | averaged weights", rows)


TABLES = (
    along_training,
    by_rate,
    detection_differences,
    accuracy_table,
    training_differences,
    *([rarest_table] if any(setting.startswith("long") for _, setting in trained()) else []),
)


@pytest.mark.parametrize("make", TABLES)
def test_the_tables_are_the_records(make):
    assert make() in (ROOT / "docs" / "samples.md").read_text()


def test_the_costs_are_those_of_the_records():
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    scored, folds = seconds()
    assert f"takes {scored:.1f} times as much CPU time as plain training" in text
    assert f"the folds {folds:.1f} times" in text


def test_a_paired_difference_is_students():
    found = Paired.of([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2.0
    # t = 2 / (1 / sqrt 3) = 3.4641 with two degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    assert found.p == pytest.approx(1 - 3.4641016 / 14**0.5, rel=1e-6)
    assert found.high - found.mean == pytest.approx(4.3026527 / 3**0.5, rel=1e-6)


if __name__ == "__main__":
    for make in TABLES:
        print(make.__name__, make(), "", sep="\n")
    print(seconds())
