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

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reproduction.md"


@cache
def runs(name: str) -> list[Run]:
    return packs.read(ROOT / "results" / f"{name}-small.jsonl")


def at(name: str, field: str, value: object) -> list[Arm]:
    return group_by_arm(run for run in runs(name) if run.header["config"][field] == value)


def spelled(arm: Arm, measure: Measure) -> str:
    found = st.spread_over_seeds(arm, measure)
    if found is None:
        return "-"
    return f"{100 * found.mean:.1f}" + (
        "" if found.deviation is None else f" ± {100 * found.deviation:.1f}"
    )


def gap(arm: Arm, other: Arm, measure: Measure) -> str:
    found = st.paired_difference(arm, other, measure)
    assert found is not None
    assert found.low is not None
    return f"{100 * found.mean:+.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def accuracies(rate: float) -> str:
    """Every arm of table 1 at a noise level."""
    columns = (
        measures.SELECTED,
        measures.LAST,
        measures.MEMORISED,
        measures.ACCEPTANCE,
        measures.STEPS_TAKEN,
    )
    lines = ["| arm | n | selected | last | memorised | accepted | steps taken |", "|---" * 7 + "|"]
    for arm in at("table1", "noise_rate", rate):
        lines.append(
            f"| {arm.name} | {len(arm.seeds)} | "
            + " | ".join(spelled(arm, measure) for measure in columns)
            + " |"
        )
    return "\n".join(lines)


def gaps(rate: float) -> str:
    """GAF against every other arm, paired."""
    arms = {arm.name: arm for arm in at("table1", "noise_rate", rate)}
    gaf = arms.pop("GAF")
    lines = ["| GAF - | n | selected | last |", "|---" * 4 + "|"]
    for name, arm in arms.items():
        lines.append(
            f"| {name} | {len(arm.seeds)} | "
            + " | ".join(gap(gaf, arm, m) for m in (measures.SELECTED, measures.LAST))
            + " |"
        )
    return "\n".join(lines)


def sizes() -> str:
    """Figure 4: the mean distance over the run, and over its last evaluation interval, for each micro-batch size."""
    lines = [
        "| b | n | mean distance, whole run | mean distance, last interval | noise scale B, last |",
        "|---" * 5 + "|",
    ]
    for b in sorted({run.header["config"]["b"] for run in runs("fig4")}):
        arm = at("fig4", "b", b)[0]
        whole = st.Spread.of(mean_distance(run) for run in arm.runs)
        late = st.Spread.of(float(run.evals[-1]["distance_mean"]) for run in arm.runs)
        scale = st.Spread.of(
            float(run.evals[-1]["noise_scale"])
            for run in arm.runs
            if run.evals[-1]["noise_scale"] is not None
        )
        assert whole is not None
        assert late is not None
        noise = "-" if scale is None else f"{scale.mean:,.0f}"
        lines.append(f"| {b} | {whole.n} | {number(whole)} | {number(late)} | {noise} |")
    return "\n".join(lines)


def number(found: st.Spread) -> str:
    return f"{found.mean:.3f}" + ("" if found.deviation is None else f" ± {found.deviation:.3f}")


def mean_distance(run: Run) -> float:
    """Over all steps of a run: intervals weigh as many steps as they have."""
    steps = [0, *(line["step"] for line in run.evals)]
    weights = [after - before for before, after in itertools.pairwise(steps)]
    return sum(w * line["distance_mean"] for w, line in zip(weights, run.evals, strict=True)) / sum(
        weights
    )


def courses(name: str) -> str:
    """Distances along the runs of a figure: first interval, lowest, last; with what had been learned and memorised at the end."""
    head = [
        "data",
        "arm",
        "n",
        "distance, first",
        "lowest",
        "last",
        "test accuracy, last (%)",
        "training accuracy, last (%)",
        "accepted (%)",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for data in dict.fromkeys(run.header["config"]["dataset"] for run in runs(name)):
        for arm in at(name, "dataset", data):
            tracks = [
                [
                    float(line["distance_mean"])
                    for line in run.evals
                    if line["distance_mean"] is not None
                ]
                for run in arm.runs
            ]
            found = [
                st.Spread.of(pick(track) for track in tracks)
                for pick in (lambda t: t[0], min, lambda t: t[-1])
            ]
            shown = [number(one) for one in found if one is not None]
            known = Measure(
                "clean", "clean", "share", lambda run: measures.last_value(run, "clean_accuracy")
            )
            rest = [
                spelled(arm, measure) for measure in (measures.LAST, known, measures.ACCEPTANCE)
            ]
            lines.append(
                f"| {data} | {arm.name} | {len(arm.seeds)} | " + " | ".join(shown + rest) + " |"
            )
    return "\n".join(lines)


def along(name: str, field: str, measure: Measure, form: str, head: str) -> str:
    """GAF, averaging and the controls at every value of a field; and what is paired of them."""
    arms = ("averaging", "GAF", "random skip", "random subset")
    lines = [
        f"| {head} | {' | '.join(arms)} | GAF - averaging | GAF - random subset |",
        "|---" * 7 + "|",
    ]
    for value in sorted({run.header["config"][field] for run in runs(name)}):
        found = {arm.name: arm for arm in at(name, field, value)}
        assert all(len(found[arm].seeds) == 3 for arm in arms)
        cells = [spelled(found[arm], measure) for arm in arms]
        cells += [gap(found["GAF"], found[arm], measure) for arm in ("averaging", "random subset")]
        lines.append(f"| {format(value, form)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(name: str, field: str, form: str, head: str) -> str:
    """What GAF accepts at every value of a field, and what it and averaging memorise."""
    lines = [
        f"| {head} | accepted | steps taken | memorised, GAF | memorised, averaging |",
        "|---" * 5 + "|",
    ]
    for value in sorted({run.header["config"][field] for run in runs(name)}):
        found = {arm.name: arm for arm in at(name, field, value)}
        cells = [
            spelled(found["GAF"], measure)
            for measure in (measures.ACCEPTANCE, measures.STEPS_TAKEN, measures.MEMORISED)
        ]
        lines.append(
            f"| {format(value, form)} | {' | '.join([*cells, spelled(found['averaging'], measures.MEMORISED)])} |"
        )
    return "\n".join(lines)


def memorising() -> str:
    """Figure 8 along its runs: every fourth evaluation."""
    averaging, gaf = (arm.runs[0].evals[1::4] for arm in group_by_arm(runs("fig8")))
    lines = [
        "| steps | memorised, averaging | memorised, GAF | accepted, GAF | steps taken, GAF | mean distance, GAF |",
        "|---" * 6 + "|",
    ]
    for a, g in zip(averaging, gaf, strict=True):
        shares = " | ".join(
            f"{100 * line[key]:.0f}"
            for line, key in ((a, "memorised"), (g, "memorised"), (g, "acceptance"))
        )
        lines.append(f"| {a['step']} | {shares} | {g['steps_taken']} | {g['distance_mean']:.3f} |")
    return "\n".join(lines)


BY_NOISE, BY_SIZE = ("fig6", "noise_rate"), ("fig9", "b")


def thresholds() -> str:
    """Figure 7; averaging is tau = 2."""
    columns = (
        measures.SELECTED,
        measures.LAST,
        measures.MEMORISED,
        measures.ACCEPTANCE,
        measures.STEPS_TAKEN,
    )
    lines = ["| tau | n | selected | last | memorised | accepted | steps taken |", "|---" * 7 + "|"]
    for tau in sorted({run.header["config"]["tau"] for run in runs("fig7")}):
        arm = at("fig7", "tau", tau)[0]
        lines.append(
            f"| {tau:g} | {len(arm.seeds)} | "
            + " | ".join(spelled(arm, measure) for measure in columns)
            + " |"
        )
    return "\n".join(lines)


TABLES = {
    "table1 0": lambda: accuracies(0.0), "table1 40": lambda: accuracies(0.4), "table1 60": lambda: accuracies(0.6),
    "gaps 0": lambda: gaps(0.0), "gaps 40": lambda: gaps(0.4), "gaps 60": lambda: gaps(0.6), "fig4": sizes,
    "fig1": lambda: courses("fig1"), "fig5": lambda: courses("fig5"), "fig8": lambda: courses("fig8"), "fig8 course": memorising,
    "fig7": thresholds,
    "fig6 last": lambda: along(*BY_NOISE, measures.LAST, ".0%", "wrong"),
    "fig6 selected": lambda: along(*BY_NOISE, measures.SELECTED, ".0%", "wrong"),
    "fig6 shares": lambda: shares(*BY_NOISE, ".0%", "wrong"), "fig9 last": lambda: along(*BY_SIZE, measures.LAST, "d", "b"),
    "fig9 selected": lambda: along(*BY_SIZE, measures.SELECTED, "d", "b"), "fig9 shares": lambda: shares(*BY_SIZE, "d", "b"),
}  # fmt: skip


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
