"""The tables of docs/optimizers.md are those of the records in results/.

`python tests/test_optimizers_page.py` prints them anew.
"""

from functools import cache
from pathlib import Path

import pytest

from gaf_lab.records import packs
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure
from gaf_lab.settings.arms import OPTIMIZER_NAMES
from helpers.rates import Search, as_text, best_of, search
from helpers.tables import by_name, percent, points_between, table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "optimizers.md"
SEEDS = [0, 1, 2, 3, 4]
POLICIES = ("averaging", "GAF", "random subset", "random skip")
DIGITS, MNIST, LOWER = "optimizers", "optimizers-mnist5k", "optimizers-all-rows"
UNSTABLE = (DIGITS, "shampoo")  # on clean labels some of its runs blow up
COMPARED = {
    DIGITS: ["sgd", "adamw", "rmsprop", "muon", "lamb", "lion", "soap", "shampoo", "schedule-free"],
    MNIST: ["sgd", "adamw", "muon", "lamb", "lion", "soap", "shampoo", "schedule-free"],
}
SEEING_ALL = ((DIGITS, "adamw"), (DIGITS, "rmsprop"), (MNIST, "adamw"))


@cache
def runs(name: str) -> list[Run]:
    return packs.read_pack(ROOT / "results" / f"{name}.jsonl")


def arms_of(optimizer: str, rate: float, pack: str = DIGITS) -> dict[str, Arm]:
    """The arms of an optimizer by the name of their policy."""
    chosen = [
        run
        for run in runs(pack)
        if run.header["config"]["optimizer"] == optimizer
        and run.header["config"]["noise_rate"] == rate
    ]
    return {name.split(",")[0]: arm for name, arm in by_name(chosen).items()}


def accuracies(rate: float, measure: Measure, pack: str = DIGITS) -> str:
    rows = []
    for optimizer in compared(rate, pack):
        arms = arms_of(optimizer, rate, pack)
        gaps = (points_between(arms["GAF"], arms[name], measure) for name in POLICIES[:3:2])
        cells = (percent(arms[name], measure) for name in POLICIES)
        rows.append([OPTIMIZER_NAMES[optimizer], *cells, *gaps])
    head = f"optimizer | {' | '.join(POLICIES)} | GAF - averaging | GAF - random subset"
    return table(head, rows)


def compared(rate: float, pack: str = DIGITS) -> list[str]:
    """The optimizers with a row at a noise level."""
    return [name for name in COMPARED[pack] if rate or (pack, name) != UNSTABLE]


def shares(rate: float, pack: str = DIGITS) -> str:
    """What GAF accepts before each optimizer, and what it and averaging memorise."""
    rows = []
    for optimizer in COMPARED[pack]:
        arms = arms_of(optimizer, rate, pack)
        found = (
            percent(arms["GAF"], measure)
            for measure in (measures.ACCEPTANCE, measures.STEPS_TAKEN, measures.MEMORISED)
        )
        plain = percent(arms["averaging"], measures.MEMORISED)
        rows.append([OPTIMIZER_NAMES[optimizer], *found, plain])
    return table("optimizer | accepted | steps taken | memorised, GAF | memorised, averaging", rows)


def moments(pack: str, optimizer: str) -> str:
    """An optimizer whose second moments see the update, or all micro-gradients."""
    rows = []
    for rate in (0.4, 0.0):
        usual, seeing = (arms_of(f"{optimizer}{end}", rate, pack) for end in ("", "-all"))
        for name in ("GAF", "random subset"):
            for measure in (measures.SELECTED, measures.LAST):
                pair = (percent(usual[name], measure), percent(seeing[name], measure))
                gap = points_between(seeing[name], usual[name], measure)
                rows.append([f"{rate:.0%}", name, measure.name, *pair, gap])
    return table("wrong | arm | measure | of the update | of all rows | all - update", rows)


def lower_rates() -> str:
    """The last evaluation of GAF at 40%, at the chosen learning rate and at lower ones."""
    rows = []
    for optimizer in ("adamw", "rmsprop"):
        usual, seeing = (gaf_by_rate(f"{optimizer}{end}") for end in ("", "-all"))
        for rate in sorted(usual, reverse=True):
            pair = [percent(arms[rate], measures.LAST) for arms in (usual, seeing)]
            gap = points_between(seeing[rate], usual[rate], measures.LAST)
            rows.append([OPTIMIZER_NAMES[optimizer], f"{rate:g}", *pair, gap])
    return table("optimizer | learning rate | of the update | of all rows | all - update", rows)


def gaf_by_rate(optimizer: str) -> dict[float, Arm]:
    """GAF's arms on digits at 40% with an optimizer, by learning rate."""
    found = [arms_of(optimizer, 0.4)["GAF"]]
    others = [run for run in runs(LOWER) if run.header["config"]["optimizer"] == optimizer]
    return {arm.config["lr"]: arm for arm in (*found, *by_name(others).values())}


def rates(pack: str = DIGITS) -> str:
    """The search: the best held-out accuracy, mean over seeds; - where a run diverged."""
    rows = []
    for optimizer in COMPARED[pack]:
        found = searched(optimizer, pack)
        rows.append([OPTIMIZER_NAMES[optimizer], as_text(found), f"{best_of(found):g}"])
    return table("optimizer | learning rate: held-out accuracy | chosen", rows)


def searched(optimizer: str, pack: str) -> Search:
    found = runs(f"{pack}-rates")
    return search(run for run in found if run.header["config"]["optimizer"] == optimizer)


TABLES = {
    "rates": rates,
    "last 40": lambda: accuracies(0.4, measures.LAST),
    "selected 40": lambda: accuracies(0.4, measures.SELECTED),
    "last 0": lambda: accuracies(0.0, measures.LAST),
    "selected 0": lambda: accuracies(0.0, measures.SELECTED),
    "shares 40": lambda: shares(0.4),
    **{
        f"moments, {name}, {pack}": lambda pack=pack, name=name: moments(pack, name)
        for pack, name in SEEING_ALL
    },
    "moments, lower rates": lower_rates,
    "MNIST-5k, rates": lambda: rates(MNIST),
    "MNIST-5k, last 40": lambda: accuracies(0.4, measures.LAST, MNIST),
    "MNIST-5k, selected 40": lambda: accuracies(0.4, measures.SELECTED, MNIST),
    "MNIST-5k, last 0": lambda: accuracies(0.0, measures.LAST, MNIST),
    "MNIST-5k, selected 0": lambda: accuracies(0.0, measures.SELECTED, MNIST),
    "MNIST-5k, shares 40": lambda: shares(0.4, MNIST),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_the_records(name):
    assert TABLES[name]() in PAGE.read_text()


@pytest.mark.parametrize("pack", COMPARED)
def test_every_arm_has_five_finished_runs_with_the_same_seeds_at_the_chosen_rate(pack):
    for rate in (0.0, 0.4):
        for optimizer in compared(rate, pack):
            arms = arms_of(optimizer, rate, pack)
            assert set(arms) == set(POLICIES)
            for arm in arms.values():
                assert sorted(arm.seeds) == SEEDS
                assert {measures.status(run) for run in arm.runs} == {"finished"}
            assert {arm.config["lr"] for arm in arms.values()} == {
                best_of(searched(optimizer, pack))
            }


def test_on_clean_labels_shampoo_blows_up_in_as_many_runs_as_the_page_says():
    found = [
        run
        for run in runs(DIGITS)
        if (run.header["config"]["optimizer"], run.header["config"]["noise_rate"])
        == (UNSTABLE[1], 0.0)
    ]
    lost = [run for run in found if run.evals[-1]["test_accuracy"] < 0.5]
    assert f"{len(lost)} of its {len(found)} runs" in PAGE.read_text()


if __name__ == "__main__":
    for name, table_of in TABLES.items():
        print(f"\n{name}\n\n{table_of()}")
