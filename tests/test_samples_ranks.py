"""The tables of ranks in docs/samples.md are those of results/label-ranks.jsonl.

`python tests/test_samples_ranks.py` prints the tables. benchmarks/label_ranks.py makes the records.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.paired import Paired
from helpers.tables import table

ROOT = Path(__file__).parents[1]
DATA = {"mnist5k": "MNIST-5k", "fashion-mnist": "Fashion-MNIST"}
PASSES, WHO = (1, 3, 12), ("all", "others")
Line = dict[str, Any]
Groups = dict[tuple[str, str], dict[str, list[Line]]]


def trained() -> Groups:
    """(data set, setting) -> rule -> its five seeds."""
    groups: Groups = {}
    lines = (ROOT / "results" / "label-ranks.jsonl").read_text().splitlines()[1:]
    for line in sorted(map(json.loads, lines), key=lambda line: line["seed"]):
        rules = groups.setdefault((line["dataset"], line["setting"]), {})
        rules.setdefault(line["rule"], []).append(line)
    assert all(len(group) == 5 for rules in groups.values() for group in rules.values())
    return {
        place: groups[place]
        for place in sorted(groups, key=lambda place: list(DATA).index(place[0]))
    }


def name_of(place: tuple[str, str]) -> str:
    return f"{DATA[place[0]]}, {place[1]}"


def of_judge(group: list[Line], who: str, passes: int, measure: str) -> list[float]:
    """Of each seed of averaging's run."""
    looks = [next(look for look in line["found"] if look["passes"] == passes) for line in group]
    return [look[who][measure] for look in looks]


THREE = ("auroc", "ap", "first100")


def found_by_ranks() -> str:
    """AUROC, average precision, precision among the first 100 of both judges of one run."""
    rows = []
    for place, rules in trained().items():
        for passes in PASSES:
            judges = [partial(of_judge, rules["averaging"], who, passes) for who in WHO]
            means = [
                ", ".join(f"{statistics.mean(of(name)):.3f}" for name in THREE) for of in judges
            ]
            gaps = [Paired.of(*(of(name) for of in judges[::-1])).text(3) for name in THREE]
            rows.append([name_of(place), passes, *means, *gaps])
    return table(
        "data, wrong labels | passes | judged by all ranks | judged by the others | "
        "AUROC, the others less all | average precision | first 100",
        rows,
    )


def issues_of_ranks() -> str:
    """Of averaging's run after 12 passes: wrong labels, and the issues of either judge."""
    rows = []
    for place, rules in trained().items():
        mean = [
            round(statistics.mean(of_judge(rules["averaging"], who, 12, name)))
            for who, name in (
                ("all", "wrong"),
                *((who, name) for who in WHO for name in ("issues", "issues_wrong")),
            )
        ]
        rows.append([name_of(place), *mean])
    return table(
        "data, wrong labels | wrong | issues, judged by all ranks | of these wrong | "
        "issues, judged by the others | of these wrong",
        rows,
    )


def last(prefix: str) -> Callable[[Line], float]:
    return lambda line: 100 * float(line["evals"][-1][f"{prefix}test_accuracy"])


def selected(prefix: str) -> Callable[[Line], float]:
    """At the first evaluation with the best accuracy on noisy held-out labels."""

    def value(line: Line) -> float:
        best = max(line["evals"], key=lambda each: each[f"{prefix}heldout_accuracy"])
        return 100 * float(best[f"{prefix}test_accuracy"])

    return value


MEASURES = {
    "last": last("own_"),
    "last, averaged weights": last(""),
    "selected": selected("own_"),
    "selected, averaged weights": selected(""),
}


def rank_glance() -> str:
    """Mean accuracy at the end, averaged weights: a row for each rule."""
    places = trained()
    rules = dict.fromkeys(rule for rules in places.values() for rule in rules)
    measure = MEASURES["last, averaged weights"]
    rows = [
        [rule, *(mean_text(measure, found.get(rule)) for found in places.values())]
        for rule in rules
    ]
    return table(" | ".join(["judged by", *map(name_of, places)]), rows)


def mean_text(measure: Callable[[Line], float], group: list[Line] | None) -> str:
    return "" if group is None else f"{statistics.mean(map(measure, group)):.1f}"


def rank_accuracies() -> str:
    rows = []
    for place, rules in trained().items():
        for rule, group in rules.items():
            values = [[measure(line) for line in group] for measure in MEASURES.values()]
            cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values]
            rows.append([name_of(place), rule, *cells])
    return table(f"data, wrong labels | judged by | {' | '.join(MEASURES)}", rows)


PAIRS = (
    ("the others", "all ranks"),
    ("all ranks", "all ranks, own means"),
    ("the others", "the others, own means"),
    ("all ranks", "averaging"),
    ("the others", "averaging"),
)


def rank_differences() -> str:
    rows = []
    for place, rules in trained().items():
        for one, other in (pair for pair in PAIRS if rules.keys() >= set(pair)):
            cells = [
                Paired.of(*(list(map(measure, rules[rule])) for rule in (one, other))).text(1)
                for measure in MEASURES.values()
            ]
            rows.append([name_of(place), f"{one}, less {other}", *cells])
    return table(f"data, wrong labels | difference | {' | '.join(MEASURES)}", rows)


TABLES = (found_by_ranks, issues_of_ranks, rank_glance, rank_accuracies, rank_differences)


@pytest.mark.parametrize("make", TABLES)
def test_the_tables_are_the_records(make: Callable[[], str]) -> None:
    assert make() in (ROOT / "docs" / "samples.md").read_text()


if __name__ == "__main__":
    for make in TABLES:
        print(make.__name__, make(), "", sep="\n")
