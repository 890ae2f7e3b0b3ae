"""The tables of docs/until-agreement.md are those of the records in results/until-agreement.jsonl.

`python tests/test_until_page.py` prints them anew; with the folder of a sweep it packs that first.
"""

import sys
from functools import cache
from pathlib import Path

from gaf_lab.records import packs
from gaf_lab.records.run import Run, read
from gaf_lab.report import measures
from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Spread
from gaf_lab.settings.plan import folder_name, from_file
from helpers.tables import by_name, percent, points_between, table, with_deviation

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "until-agreement.md"
PACK = ROOT / "results" / "until-agreement.jsonl"
PLAN = ROOT / "benchmarks" / "until_agreement.toml"
RHOS = ("0.5", "0.7", "0.9")
SHOWN = (measures.SELECTED, measures.LAST, measures.MEMORISED)


@cache
def runs() -> list[Run]:
    return packs.read_pack(PACK)


def runs_at(rate: float) -> list[Run]:
    return [run for run in runs() if run.header["config"]["noise_rate"] == rate]


def mean_size(arm: Arm) -> str:
    """Micro-batches per step, over whole runs."""
    ends = [run.evals[-1] for run in arm.runs]
    k = arm.config["k"]
    found = Spread.of([k * end["step"] / end["steps_taken"] for end in ends])
    assert found is not None
    return with_deviation(found, 1, 1)


def sizes_along(arm: Arm) -> str:
    """Micro-batches per step in the first and the last interval between evaluations."""
    found = []
    for i in (0, -1):
        shares = []
        for run in arm.runs:
            line, before = run.evals[i], run.evals[i - 1] if i else {"step": 0, "steps_taken": 0}
            micro = line["step"] - before["step"]
            steps = line["steps_taken"] - before["steps_taken"]
            shares.append(run.header["config"]["k"] * micro / steps)
        found.append(sum(shares) / len(shares))
    return f"{found[0]:.1f}, {found[1]:.1f}"


def accuracies(rate: float) -> str:
    """Every arm at a noise level."""
    rows = []
    for name, arm in by_name(runs_at(rate)).items():
        measured: list[Measure] = list(SHOWN if rate else SHOWN[:2])
        cells = [percent(arm, measure) for measure in measured]
        rows.append([name, len(arm.seeds), mean_size(arm), sizes_along(arm), *cells])
    more = " | memorised" if rate else ""
    return table(f"arm | n | mean c | first, last | selected | last{more}", rows)


def gaps(rate: float) -> str:
    """Growing steps against their controls, paired, and against c = 8."""
    arms = by_name(runs_at(rate))
    rows = []
    for rho in RHOS:
        own = arms[f"rho {rho}"]
        others = {
            "c = 1": arms["averaging, c = 1"],
            "c = 8": arms["averaging, c = 8"],
            "mean size": arms[f"mean size of rho {rho}"],
            "sizes of another seed": arms[f"sizes of rho {rho}, another seed"],
        }
        for name, other in others.items():
            found = (points_between(own, other, m) for m in (measures.SELECTED, measures.LAST))
            rows.append([f"rho {rho} - {name}", *found])
    return table("difference | selected | last", rows)


TABLES = {
    "clean": lambda: accuracies(0.0),
    "noisy": lambda: accuracies(0.4),
    "clean gaps": lambda: gaps(0.0),
    "noisy gaps": lambda: gaps(0.4),
}


def test_the_tables_are_those_of_the_records() -> None:
    text = PAGE.read_text()
    for name, make in TABLES.items():
        assert make() in text, name


def test_the_records_are_of_the_plan() -> None:
    assert {run.header["config_hash"] for run in runs() if not run.header["config"]["replay"]} == {
        config.hash for config in from_file(PLAN) if config.replay is None
    }
    assert len(runs()) == len(from_file(PLAN))
    assert all(run.end is not None and run.end["status"] == "finished" for run in runs())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = [read(Path(sys.argv[1]) / folder_name(config)) for config in from_file(PLAN)]
        packs.write_pack(found, PACK)
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
