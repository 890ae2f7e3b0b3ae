"""The tables of docs/metrics.md are those of the records in results/metrics.jsonl.

`python tests/test_metrics_page.py` prints them anew; with the folder of both sweeps it packs their
runs first.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from gaf_lab.records import packs
from gaf_lab.records.run import Run, read
from gaf_lab.report import measures
from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import folder_name, from_file
from helpers.rates import as_text, best_of, search
from helpers.tables import by_name, percent, points_between, table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
PACK = ROOT / "results" / "metrics.jsonl"
ENDS = ("", "_worker", "_mlp", "_mlp_worker")
PLANS = [ROOT / "benchmarks" / f"metrics{end}.toml" for end in ENDS]
NARROW, WIDE = "mlp-small", "mlp"
METRICS = ("euclidean", "optimizer", "whitened")
COMPARED = (measures.SELECTED, measures.LAST)
BAD_WORKER = 0.125


@cache
def runs() -> list[Run]:
    return packs.read_pack(PACK)


def arms_at(rate: float, model: str = NARROW) -> dict[str, Arm]:
    chosen = (rate, model)
    return by_name(
        run
        for run in runs()
        if (run.header["config"]["noise_rate"], run.header["config"]["model"]) == chosen
    )


def planned() -> Iterator[tuple[str, TrainConfig]]:
    """Every run as its sweep's name and its config."""
    for plan in PLANS:
        for config in from_file(plan):
            yield plan.stem, config


def accuracies(rate: float, model: str = NARROW) -> str:
    """Every arm of a scenario."""
    wrong = [measures.MEMORISED] if rate else []
    shown: list[Measure] = [*COMPARED, *wrong, measures.ACCEPTANCE, measures.STEPS_TAKEN]
    rows = [[name, *(percent(arm, m) for m in shown)] for name, arm in arms_at(rate, model).items()]
    head = " | ".join(m.label if m in shown[2:] else m.name for m in shown)
    return table(f"arm | {head}", rows)


def against_controls(rate: float, start: str = "", model: str = NARROW) -> str:
    """GAF by each metric less averaging, and less the controls that replay it."""
    rows = []
    for metric in METRICS:
        own = f"{metric}{start}"
        for other in ("averaging", f"random subset of {own}", f"random skip of {own}"):
            if other in arms_at(rate, model):
                rows.append(gap(rate, own, other, model))
    return differences(rows)


def against_euclidean(rate: float, *variants: str, model: str = NARROW) -> str:
    """GAF by the other metrics less GAF by the paper's."""
    return differences(
        gap(rate, f"{metric}{variant}", f"euclidean{variant}", model)
        for variant in variants
        for metric in METRICS[1:]
    )


def gap(rate: float, name: str, other: str, model: str) -> list[str]:
    arms = arms_at(rate, model)
    found = (points_between(arms[name], arms[other], measure) for measure in COMPARED)
    return [f"{name} - {other}", *found]


def differences(rows: Iterable[list[str]]) -> str:
    return table("difference | selected | last", rows)


TABLES = {
    "40%": lambda: accuracies(0.4),
    "40%, controls": lambda: against_controls(0.4),
    "40%, metrics": lambda: against_euclidean(0.4, "", ", quantile"),
    "clean": lambda: accuracies(0.0),
    "clean, controls": lambda: against_controls(0.0),
    "clean, metrics": lambda: against_euclidean(0.0, "", ", quantile"),
    "bad worker": lambda: accuracies(BAD_WORKER),
    "bad worker, controls": lambda: against_controls(BAD_WORKER, ", start best"),
    "bad worker, metrics": lambda: against_euclidean(BAD_WORKER, "", ", start best"),
    "wide, 40%": lambda: accuracies(0.4, WIDE),
    "wide, 40%, controls": lambda: against_controls(0.4, model=WIDE),
    "wide, 40%, metrics": lambda: against_euclidean(0.4, "", model=WIDE),
    "wide, bad worker": lambda: accuracies(BAD_WORKER, WIDE),
    "wide, bad worker, controls": lambda: against_controls(BAD_WORKER, ", start best", WIDE),
    "wide, bad worker, metrics": lambda: against_euclidean(BAD_WORKER, ", start best", model=WIDE),
}


def test_the_wider_networks_rate_is_the_best_of_its_search() -> None:
    found = search(packs.read_pack(ROOT / "results" / "metrics-mlp-rates.jsonl"))
    assert best_of(found) == 0.003
    assert " ".join(PAGE.read_text().split()).count(as_text(found)) == 1
    assert {arm.config["lr"] for arm in arms_at(0.4, WIDE).values()} == {0.003}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_the_records(name: str) -> None:
    assert TABLES[name]() in PAGE.read_text()


def test_the_records_are_those_of_the_plans() -> None:
    hashes = {config.hash for _, config in planned()}
    assert {run.header["config_hash"] for run in runs()} == hashes
    assert {measures.status(run) for run in runs()} == {"finished"}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        found = [read(folder / name / folder_name(config)) for name, config in planned()]
        packs.write_pack(found, PACK)
    for name, table_of in TABLES.items():
        print(f"\n{name}\n\n{table_of()}")
