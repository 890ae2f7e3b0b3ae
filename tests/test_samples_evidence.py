"""What docs/samples.md says was measured is in the records in results/.

`python tests/test_samples_evidence.py` prints the tables. The records are made by
benchmarks/label_detection.py, benchmarks/label_training.py and examples/cleanlab_compare.py.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gaf_lab.records.packs import read_pack
from gaf_lab.records.run import Run
from helpers.paired import Paired
from helpers.tables import table

ROOT = Path(__file__).parents[1]
DATA = {"mnist5k": "MNIST-5k", "fashion-mnist": "Fashion-MNIST"}
HUMAN = {"cifar100n": "CIFAR-100N, 100 classes", "cifar100n-coarse": "CIFAR-100N, 20 classes"}
NOISE = {"symmetric": "symmetric", "asymmetric": "class-dependent"}
Lines = list[dict[str, Any]]

# ------------------------------------------------------------------------------------ detection

BEST_OF_FOLDS = 3  # passes, at which the folds find most
ON_HUMAN = ("loss", "teacher", "vote", "inner", "plain", "prototype")
EACH = (ON_HUMAN[0], "margin", *ON_HUMAN[1:])


def found() -> dict[tuple[str, str, float, str, int], Lines]:
    """The seeds of each data set, noise, rate, way and number of passes."""
    groups: dict[tuple[str, str, float, str, int], Lines] = {}
    text = (ROOT / "results" / "label-detection.jsonl").read_text().splitlines()
    for line in sorted(map(json.loads, text[1:]), key=lambda line: line["seed"]):
        place = (line["dataset"], line["noise"], line["rate"], line["way"], line["passes"])
        groups.setdefault(place, []).append(line)
    return groups


def scores(group: Lines, name: str, measure: str) -> list[float]:
    return [line["scores"][name][measure] for line in group if name in line["scores"]]


def cell(group: Lines | None, name: str, measure: str) -> str:
    found = [] if group is None else scores(group, name, measure)
    return f"{statistics.mean(found):.3f}" if found else ""


def along_training() -> str:
    """AUROC over training: each score at the last visit, and over all visits."""
    groups, rows = found(), []
    for data in DATA:
        for noise in NOISE:
            for passes in (1, 3, 6, 12, 24):
                group = groups[data, noise, 0.4, "watched", passes]
                both = [
                    f"{cell(group, name, 'auroc')}, {cell(group, f'history_{name}', 'auroc')}"
                    for name in EACH
                ]
                differed = [
                    cell(group, f"history_{name}", "auroc")
                    for name in ("disagreement", "prototype_disagreement")
                ]
                folds = cell(groups.get((data, noise, 0.4, "folds", passes)), "folds", "auroc")
                start = [f"{DATA[data]}, {NOISE[noise]}", passes]
                rows.append([*start, *both, *differed, folds])
    return table(
        "data, noise | passes | loss | margin | teacher | vote | inner product | plain prototype | "
        "prototype | the network disagreed | the nearest prototype did | five folds",
        rows,
    )


def by_rate() -> str:
    """AUROC, average precision and precision among the first 100 after 12 passes."""
    groups, rows = found(), []
    for data, noise, rate in settings(groups):
        group = groups[data, noise, rate, "watched", 12]
        folds = groups.get((data, noise, rate, "folds", BEST_OF_FOLDS))
        cells = [
            three(group, f"history_{name}") for name in ("loss", "margin", "plain", "prototype")
        ]
        counts = [
            round(statistics.mean(line[name] for line in group))
            for name in ("wrong", "issues", "issues_wrong")
        ]
        start = f"{DATA[data]}, {NOISE[noise]} {100 * rate:.0f}%"
        folded = "" if folds is None else three(folds, "folds")
        rows.append([start, *cells, folded, *counts])
    return table(
        "data, noise | mean loss | mean margin | mean plain prototype | mean prototype | "
        "five folds, 3 passes | wrong | issues of `report()` | of these wrong",
        rows,
    )


def human() -> list[tuple[tuple[str, str, float, str, int], Lines]]:
    """The groups with human labels, of three seeds."""
    groups = [(key, group) for key, group in found().items() if key[0] in HUMAN]
    assert all([line["seed"] for line in group] == [0, 1, 2] for _, group in groups)
    return groups


def human_differences() -> str:
    """AUROC of mean prototypes after 12 passes, less that of others, on human labels."""
    rows = []
    for (data, _, _, _, passes), group in human():
        for kind in ("plain", "prototype") if passes == 12 else ():
            own = scores(group, f"history_{kind}", "auroc")
            names = ("loss", "teacher", "inner", "disagreement")
            others = [scores(group, f"history_{name}", "auroc") for name in names]
            name = {"plain": "plain prototype", "prototype": "prototype"}[kind]
            rows.append([HUMAN[data], name, *(Paired.of(own, other).text(3) for other in others)])
    return table(
        "data | mean | against mean loss | mean teacher | mean inner product | "
        "the network disagreed",
        rows,
    )


def test_what_the_page_says_of_human_labels():
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    fine, coarse = (group for key, group in human() if key[4] == 12)

    def mean(group: Lines, name: str, measure: str = "auroc") -> float:
        return statistics.mean(scores(group, f"history_{name}", measure))

    own, loss = ([mean(group, name) for group in (fine, coarse)] for name in ("prototype", "loss"))
    assert (
        "AUROC is {:.2f} and {:.2f}, that of the mean loss {:.2f} and {:.2f}".format(*own, *loss)
        in text
    )
    assert f"level with the mean loss, {own[0]:.3f} and {loss[0]:.3f}; with 20 they are" in text
    plain = mean(coarse, "plain")
    assert f"{loss[1] - own[1]:.3f} behind it, plain ones {loss[1] - plain:.3f}" in text
    assert f"it costs {plain - own[1]:.3f} there" in text
    assert f"gains {own[0] - mean(fine, 'plain'):.3f} with 100" in text
    gaps = [mean(group, name) for name in ("plain", "inner") for group in (fine, coarse)]
    assert f"gain {gaps[0] - gaps[2]:.3f} and {gaps[1] - gaps[3]:.3f} AUROC" in text
    first = [100 * mean(coarse, name, "first100") for name in ("plain", "teacher", "prototype")]
    assert (
        "find {:.0f} wrong labels, the teacher {:.0f}, refined prototypes {:.0f}".format(*first)
        in text
    )
    listed, right = (
        [statistics.mean(line[name] for line in group) for group in (fine, coarse)]
        for name in ("issues", "issues_wrong")
    )
    assert (
        f"calls {listed[0]:,.0f} of 50,000 labels issues, of which {right[0] / listed[0]:.0%}"
        in text
    )
    assert f"{listed[1]:,.0f} with 20 classes, of which {right[1] / listed[1]:.0%}" in text
    margins = [
        statistics.mean(scores(group[1:], "history_margin", "auroc"))
        - statistics.mean(scores(group[1:], "history_loss", "auroc"))
        for group in (fine, coarse)
    ]
    assert "by {:.3f} with 100 classes and {:.3f} with 20".format(*margins) in text


def on_human_labels() -> str:
    """The same scores on human labels."""
    rows = []
    for (data, _, _, _, passes), group in human():
        both = [
            f"{cell(group, name, 'auroc')}, {cell(group, f'history_{name}', 'auroc')}"
            for name in ON_HUMAN
        ]
        differed = [
            cell(group, f"history_{name}", "auroc")
            for name in ("disagreement", "prototype_disagreement")
        ]
        accuracy = 100 * statistics.mean(line["accuracy"] for line in group)
        rows.append([HUMAN[data], passes, f"{accuracy:.1f}", *both, *differed])
    return table(
        "data | passes | test accuracy | loss | teacher | vote | inner product | plain prototype | "
        "prototype | the network disagreed | the nearest prototype did",
        rows,
    )


def reported_on_human_labels() -> str:
    """AUROC, average precision, precision among the first 100, and issues, at the end."""
    rows = []
    for (data, _, _, _, passes), group in human():
        if passes == 12:
            names = ("loss", "teacher", "plain", "prototype", "disagreement")
            cells = [three(group, f"history_{name}") for name in names]
            counts = [
                round(statistics.mean(line[name] for line in group))
                for name in ("wrong", "issues", "issues_wrong")
            ]
            rows.append([HUMAN[data], *cells, *counts])
    return table(
        "data | mean loss | mean teacher | mean plain prototype | mean prototype | "
        "the network disagreed | wrong | issues of `report()` | of these wrong",
        rows,
    )


THREE = ("auroc", "ap", "first100")


def three(group: Lines | None, name: str) -> str:
    return ", ".join(cell(group, name, measure) for measure in THREE)


def detection_differences() -> str:
    """AUROC of the mean prototype score after 12 passes, less that of others."""
    groups, rows = found(), []
    for data, noise, rate in settings(groups):
        group = groups[data, noise, rate, "watched", 12]
        folds = groups.get((data, noise, rate, "folds", BEST_OF_FOLDS))
        own = scores(group, "history_prototype", "auroc")
        others = {
            name: scores(group, f"history_{name}", "auroc")
            for name in ("loss", "margin", "teacher", "vote", "plain", "disagreement")
        }
        if folds is not None:
            others["folds"] = scores(folds, "folds", "auroc")
        cells = [Paired.of(own, other).text(3) for other in others.values()]
        blank = [""] if folds is None else []
        rows.append([f"{DATA[data]}, {NOISE[noise]} {100 * rate:.0f}%", *cells, *blank])
    return table(
        "data, noise | against mean loss | mean margin | mean teacher | mean vote | "
        "mean plain prototype | the network disagreed | five folds, 3 passes",
        rows,
    )


def cosine_differences() -> str:
    """AUROC of plain prototypes by scaled cosines, less that by inner products, of mean scores."""
    groups, rows = found(), []
    for data, noise, rate in settings(groups):
        cells = []
        for passes in (1, 3, 6, 12):
            group = groups[data, noise, rate, "watched", passes]
            plain, inner = (scores(group, f"history_{way}", "auroc") for way in ("plain", "inner"))
            cells.append(Paired.of(plain, inner).text(3))
        rows.append([f"{DATA[data]}, {NOISE[noise]} {100 * rate:.0f}%", *cells])
    return table("data, noise | 1 pass | 3 passes | 6 passes | 12 passes", rows)


def settings(groups: dict[tuple[str, str, float, str, int], Lines]) -> list[tuple[str, str, float]]:
    """Data set, noise and rate, of which five seeds are there."""
    return [
        (data, noise, rate)
        for data in DATA
        for noise in NOISE
        for rate in (0.1, 0.2, 0.4, 0.6)
        if len(groups.get((data, noise, rate, "watched", 12), [])) >= 5
    ]


def seconds() -> tuple[float, float]:
    """CPU time, in plain trainings of as many passes: of taking all scores, and of the folds."""
    groups = {key: group for key, group in found().items() if key[2] == 0.4}

    def mean(way: str, passes: int) -> float:
        picked = [group for key, group in groups.items() if key[3:] == (way, passes)]
        lines = [line for group in picked for line in group]
        return statistics.mean(line["cpu_seconds"] / line["plain_cpu_seconds"] for line in lines)

    return mean("watched", 24), mean("folds", 12) * 24 / 12


# ------------------------------------------------------------------------------------ cleanlab

WAYS = {
    ("agreement", 12): "`report()`, one training of 12 passes",
    ("cleanlab", 6): "cleanlab, five folds of 6 passes",
    ("cleanlab", 12): "cleanlab, five folds of 12 passes",
}


def cleanlab(end: str = "") -> dict[tuple[str, float, bool, str, int], Lines]:
    """The seeds of each noise, rate, kind of pixels, way and number of passes."""
    groups: dict[tuple[str, float, bool, str, int], Lines] = {}
    text = (ROOT / "results" / f"cleanlab{end}.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
        case = line["noise"], line["rate"], line["standardised"], line["way"], line["passes"]
        groups.setdefault(case, []).append(line)
    order = sorted(groups, key=lambda case: (case[0], case[1], not case[2]))
    return {case: groups[case] for case in order}


def test_pixels_that_are_not_standardised_suffice():
    """They did not, before cosines."""
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    case = "class-dependent", 0.4, False, "agreement", 12
    before, now = ([line["auroc"] for line in cleanlab(end)[case]] for end in ("-inner", ""))
    assert f"and the mean AUROC was {statistics.mean(before):.3f}" in text
    assert sum(auroc < 0.91 for auroc in before) == 3 and "in three of five seeds" in text
    assert f"it is {statistics.mean(now):.3f}, and no seed is below 0.99" in text
    assert min(now) >= 0.99


def case_name(noise: str, rate: float, standardised: bool) -> str:
    return f"{noise} {100 * rate:.0f}%, {'standardised' if standardised else 'in [0, 1]'}"


def beside_cleanlab() -> str:
    """AUROC, the first 100, and precision and recall of the issues of each way."""
    groups, rows = cleanlab(), []
    for case in dict.fromkeys(case[:3] for case in groups):
        rows.append([case_name(*case), *(in_short(groups[(*case, *way)]) for way in WAYS)])
    return table(" | ".join(["noise, pixels", *WAYS.values()]), rows)


def in_short(group: Lines) -> str:
    shares = [
        statistics.mean(line["issues_wrong"] / line[of] for line in group)
        for of in ("issues", "wrong")
    ]
    auroc, first = (statistics.mean(line[name] for line in group) for name in ("auroc", "first100"))
    return f"{auroc:.3f}, {first:.0f}, {100 * shares[0]:.0f}%, {100 * shares[1]:.0f}%"


def cleanlab_table() -> str:
    """Means over the seeds, and the AUROC of one training less that of the folds."""
    groups, rows = cleanlab(), []
    for (*case, way, passes), group in groups.items():
        ours = groups[(*case, "agreement", 12)]
        gain = Paired.of(*([line["auroc"] for line in some] for some in (ours, group))).text(3)
        means = [
            f"{statistics.mean(line[name] for line in group):.{digits}f}"
            for name, digits in COUNTED.items()
        ]
        start = [case_name(*case), WAYS[way, passes]]
        rows.append([*start, *means, "" if group is ours else gain])
    return table(
        "noise, pixels | way | AUROC | wrong among the first 100 | wrong | issues | "
        "of these wrong | CPU seconds | AUROC of one training less this",
        rows,
    )


COUNTED = {"auroc": 3, "first100": 0, "wrong": 0, "issues": 0, "issues_wrong": 0, "cpu_seconds": 1}


# ------------------------------------------------------------------------------------ training

OURS = "audit, restart with ELR"
WEIGHTS, BOTH = "prototype weights", "prototype weights with ELR"
# noise, its rate, imbalance, sampler, and how the page calls it
SETTINGS = (
    ("asymmetric", 0.4, 1.0, "iid", "class-dependent 40%"),
    ("symmetric", 0.4, 1.0, "iid", "symmetric 40%"),
    ("none", 0.0, 1.0, "iid", "clean"),
    ("none", 0.0, 50.0, "iid", "long tail 50 : 1"),
    ("symmetric", 0.125, 1.0, "sharded", "one bad shard of eight"),
)
OTHER_RATES = (
    ("asymmetric", 0.2, 1.0, "iid", "class-dependent 20%"),
    *(("symmetric", rate, 1.0, "iid", f"symmetric {100 * rate:.0f}%") for rate in (0.1, 0.2, 0.6)),
)
Cells = dict[str, list[Run]]  # arm -> runs in the order of their seeds


def trained(settings: Sequence[tuple[Any, ...]] = SETTINGS) -> dict[tuple[str, str], Cells]:
    """(data set, setting) -> the arms of which five seeds are finished."""
    names = {setting[:-1]: setting[-1] for setting in (*SETTINGS, *OTHER_RATES)}
    places: dict[tuple[str, str], Cells] = {}
    runs = read_pack(ROOT / "results" / "label-training.jsonl")
    for run in sorted(runs, key=lambda run: run.seed):
        config = run.header["config"]
        keys = ("noise", "noise_rate", "imbalance", "sampler")
        name = names[tuple(config[key] for key in keys)]
        place = places.setdefault((config["dataset"], name), {})
        place.setdefault(run.arm, []).append(run)
    wanted = [(data, setting[-1]) for data in DATA for setting in settings]
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


own_last = partial(last, prefix="own_")
MEASURES: dict[str, Callable[[Run], float]] = {
    "last": own_last,
    "last, averaged weights": last,
    "selected": lambda run: selected(run, "own_"),
    "selected, averaged weights": selected,
}


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def at_a_glance() -> str:
    """Mean accuracy at the end, averaged weights: a row for each rule."""
    return glance(lambda arm: last)


def at_equal_time() -> str:
    """The same at the evaluation nearest to the time that averaging takes for all passes."""
    spent = costs()

    def measure(arm: str) -> Callable[[Run], float] | None:
        return partial(within, 1 / spent[arm]) if arm in spent else None

    return glance(measure)


def within(share: float, run: Run) -> float:
    """Test accuracy of the averaged weights after about this share of the passes."""
    passes = share * run.evals[-1]["passes"]
    nearest = min(run.evals, key=lambda line: abs(line["passes"] - passes))
    return float(nearest["test_accuracy"])


def at_other_rates() -> str:
    """As `at_a_glance`."""
    return glance(lambda arm: last, OTHER_RATES)


def glance(
    measure_of: Callable[[str], Callable[[Run], float] | None],
    settings: Sequence[tuple[Any, ...]] = SETTINGS,
) -> str:
    places = trained(settings)
    rows = []
    for arm in dict.fromkeys(arm for found in places.values() for arm in found):
        measure = measure_of(arm)
        if measure is not None:
            means = (
                f"{100 * statistics.mean(map(measure, found[arm])):.1f}" if arm in found else ""
                for found in places.values()
            )
            rows.append([arm, *means])
    heads = [f"{DATA[data]}, {setting}" for data, setting in places]
    return table(" | ".join(["rule", *heads]), rows)


CHANGED = ("prototype weights", "prototype weights with ELR", OURS)  # since
# by the end of the file's name: the machine, and before which change of the rule
MACHINES = {
    "": ("H200", ", before depth"),
    "-cpu": ("CPU", ", before cosines"),
    "-depth": ("CPU, float32", ", before separation"),
    "-float32": ("CPU, float32", ""),
}
ELSEWHERE = {"-depth": "-float32"}  # where the averaging of the same machine is
HumanArms = dict[tuple[str, str, str], list[Run]]


def human_arms() -> HumanArms:
    """(labels, arm, end of the file's name) -> the runs in the order of their seeds."""
    arms: HumanArms = {}
    for end in MACHINES:
        runs = read_pack(ROOT / "results" / f"label-training-human{end}.jsonl")
        for run in sorted(runs, key=lambda run: run.seed):
            labels = HUMAN[run.header["config"]["dataset"]].partition(", ")[2]
            arms.setdefault((labels, run.arm, end), []).append(run)
    return arms


def trained_on_human_labels() -> str:
    """CIFAR-100N, paired seeds: accuracy, and the difference to averaging in points.

    The averaging is that of the same machine where all its seeds were trained there too.
    """
    arms = {place: found for place, found in human_arms().items() if len(found) == 3}
    rows = []
    for (labels, arm, end), found in sorted(arms.items(), key=lambda item: item[0][0]):
        same = labels, "averaging", ELSEWHERE.get(end, end)
        plain = arms.get(same) or arms[labels, "averaging", ""]
        cells = [spread([measure(run) for run in found]) for measure in (own_last, last)]
        pair = ([100 * last(run) for run in some] for some in (found, plain))
        less = "" if arm == "averaging" else Paired.of(*pair).text(1)
        machine, before = MACHINES[end]
        rows.append([labels, f"{arm}{before if arm in CHANGED else ''}", machine, *cells, less])
    return table(
        "labels | rule | machine | last | last, averaged weights | the same, less averaging",
        rows,
    )


def long_arms(end: str = "") -> Cells:
    arms: Cells = {}
    for run in read_pack(ROOT / "results" / f"label-training-long{end}.jsonl"):
        arms.setdefault(run.arm, []).append(run)
    return arms


def trained_long() -> str:
    """CIFAR-100N, 36 passes: the averaged weights at the end, and where held-out labels select."""
    arms, measures = long_arms(), (last, selected)
    rows = []
    for arm, found in arms.items():
        assert [run.seed for run in found] == list(range(5))
        cells = []
        for measure in measures:
            own, plain = (
                [100 * measure(run) for run in some] for some in (found, arms["averaging"])
            )
            less = "" if arm == "averaging" else Paired.of(own, plain).text(1)
            cells += [spread([measure(run) for run in found]), less]
        memorised = statistics.mean(100 * run.evals[-1]["memorised"] for run in found)
        rows.append([arm, *cells, f"{memorised:.0f}%"])
    return table(
        "rule | last | less averaging | selected | less averaging | wrong labels memorised",
        rows,
    )


def along_long_runs() -> str:
    """Means over the seeds along the training; then seed 0, also without the gate."""
    arms = long_arms()
    first = {arm: arms[arm][:1] for arm in ("averaging", "ELR")} | long_arms("-ungated")
    assert all([run.seed for run in found] == [0] for found in first.values())
    passes = [line["passes"] for line in arms["averaging"][0].evals]
    rows = []
    for arm, found in (*arms.items(), *((f"{arm}, seed 0", runs) for arm, runs in first.items())):
        means = [
            statistics.mean(100 * run.evals[i]["test_accuracy"] for run in found)
            for i in range(len(passes))
        ]
        rows.append([arm, *(f"{mean:.1f}" for mean in means)])
    return table(" | ".join(["rule, passes", *(f"{number:.1f}" for number in passes)]), rows)


def test_what_the_page_says_of_the_long_runs():
    arms, bare = long_arms(), long_arms("-ungated")
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    plain = arms["averaging"]
    seen = [run.evals[-1]["separation"] for arm in (WEIGHTS, BOTH) for run in arms[arm]]
    assert f"{min(seen):.2f} to {max(seen):.2f} at the end" in text
    same = [
        (last(a), selected(a)) == (last(b), selected(b))
        for a, b in zip(plain, arms[WEIGHTS], strict=True)
    ]
    assert all(same)
    assert "to the last digit" in text
    pairs = zip(arms["ELR"], arms[BOTH], strict=True)
    apart = [
        100 * abs(x["test_accuracy"] - y["test_accuracy"])
        for a, b in pairs
        for x, y in zip(a.evals, b.evals, strict=True)
    ]
    assert f"accuracies are within {max(apart):.1f} points of ELR's" in text
    ones = [line["sample_weight"] == 1 for run in arms[BOTH] for line in run.evals]
    assert all(ones)
    lasts, best = (
        [100 * statistics.mean(map(measure, arms[arm])) for arm in ("ELR", "averaging")]
        for measure in (last, selected)
    )
    ahead = f"{lasts[0] - lasts[1]:.1f} points"
    assert f"it ends {ahead} ahead of averaging, which loses {best[1] - lasts[1]:.1f}" in text
    assert f"it ends {ahead} ahead, {best[0] - best[1]:.1f} where held-out" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    chosen = f"{best[0] - best[1]:.1f} where held-out labels select (five)"
    assert f"ends {ahead} ahead of averaging there, or {chosen}" in readme
    (own,), (with_elr,) = bare[f"{WEIGHTS}, without the gate"], bare[f"{BOTH}, without the gate"]
    assert (
        f"{100 * last(own):.1f} at the end, where averaging has {100 * last(plain[0]):.1f}, and "
        f"{100 * selected(own):.1f} where held-out labels select, against "
        f"{100 * selected(plain[0]):.1f}"
    ) in text
    assert (
        f"With ELR they end at {100 * last(with_elr):.1f}, ELR alone at "
        f"{100 * last(arms['ELR'][0]):.1f}"
    ) in text
    seconds = [
        max(run.end["seconds"] for found in some for run in found)
        for some in (
            [found[:3] for found in arms.values()],
            [found[3:] for found in arms.values()],
            bare.values(),
        )
    ]
    assert max(seconds) < 300
    assert "in less than five minutes" in text
    engine = " ".join((ROOT / "docs" / "engine.md").read_text().split())
    assert "took {:.0f} and {:.0f} seconds".format(*seconds) in engine
    assert f"two runs alone took {seconds[2]:.0f} seconds" in engine


def test_one_seed_of_averaging_shows_how_far_the_machines_differ():
    arms = human_arms()
    ends = [
        100 * last(arms["100 classes", "averaging", end][0]) for end in ("-cpu", "-float32", "")
    ]
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    assert (
        "ends at {:.1f} and {:.1f} on the two CPUs and at {:.1f} on the H200".format(*ends) in text
    )


def test_one_seed_of_an_audit_that_always_starts_again_beside_averaging():
    arms = human_arms()
    places = ("100 classes", OURS, "-depth"), ("100 classes", "averaging", "-float32")
    ends = [100 * last(arms[place][0]) for place in places]
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    assert "it ends at {:.1f}, where averaging ends at {:.1f}".format(*ends) in text


def test_audits_start_again_where_labels_are_wrong_and_nowhere_else():
    ends: dict[bool, list[float]] = {True: [], False: []}
    for run in read_pack(ROOT / "results" / "label-training.jsonl"):
        end = run.evals[-1]
        if end.get("restarted") is not None and end["separation"] is not None:
            assert end["restarted"] == (run.header["config"]["noise"] != "none")
            ends[end["restarted"]].append(end["separation"])
    again, on = ends[True], ends[False]
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    assert (
        f"in all {len(again)} runs with wrong labels (separation {min(again):.2f} to "
        f"{max(again):.2f}), and in none of the {len(on)} without ({min(on):.2f} to {max(on):.2f})"
    ) in text


def test_audits_on_human_labels_do_not_start_again():
    runs = read_pack(ROOT / "results" / "label-training-human-audit.jsonl")
    ends = [run.evals[-1] for run in runs]
    assert not any(end["restarted"] for end in ends)
    assert all(round(end["passes"]) == 3 for end in ends)
    found = [f"{end['separation']:.2f}" for end in ends]
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    assert "its separation is {} with 100 classes and {} with 20".format(*found) in text


def test_gaf_is_behind_random_skip_on_human_labels():
    arms = human_arms()
    gaf, skip = (
        [100 * last(run) for run in arms["100 classes", arm, "-cpu"]]
        for arm in ("GAF", "random skip")
    )
    found = Paired.of(gaf, skip)
    text = " ".join((ROOT / "docs" / "samples.md").read_text().split())
    assert f"GAF is {-found.mean:.1f} behind random skip (p {found.p:.3f})" in text


def costs() -> dict[str, float]:
    """CPU time of each rule, in that of averaging."""
    lines = (ROOT / "results" / "label-training-cost.jsonl").read_text().splitlines()[1:]
    found = map(json.loads, lines)
    return {line["rule"]: line["cpu_ratio_median"] for line in found}


def cost_table() -> str:
    return table("rule | CPU time", ([rule, f"{ratio:.2f}"] for rule, ratio in costs().items()))


def accuracy_table() -> str:
    rows = []
    for (data, setting), arms in trained().items():
        for arm, runs in arms.items():
            cells = [spread([measure(run) for run in runs]) for measure in MEASURES.values()]
            rows.append([f"{DATA[data]}, {setting}", arm, *cells])
    return table(f"data, labels | rule | {' | '.join(MEASURES)}", rows)


def training_differences() -> str:
    """Of audit and restart against every other rule, in points."""
    return differences(OURS, None)


def elr_differences() -> str:
    """Of prototype weights with ELR against rivals, and against either alone, in points."""
    rivals = ("averaging", "GCE", "ELR", "prototype weights", OURS, "the same, no suspects", "GAF")
    return differences(BOTH, rivals)


def weights_differences() -> str:
    """Of prototype weights against averaging and controls, in points."""
    controls = ("averaging", "plain prototype weights", "prototype weights, shuffled")
    return differences("prototype weights", controls)


def differences_at_other_rates() -> str:
    """Of prototype weights with ELR against rivals, in points."""
    return differences(BOTH, ("averaging", "GCE", "ELR", OURS), OTHER_RATES)


def differences(
    own: str,
    others: tuple[str, ...] | None,
    settings: Sequence[tuple[Any, ...]] = SETTINGS,
) -> str:
    rows = []
    for (data, setting), arms in trained(settings).items():
        for arm, runs in arms.items():
            if arm == own or own not in arms or (others and arm not in others):
                continue
            cells = [
                Paired.of(*([100 * measure(run) for run in some] for some in (arms[own], runs)))
                for measure in (MEASURES["last"], last, selected)
            ]
            rows.append([f"{DATA[data]}, {setting}", arm, *(cell.text(1) for cell in cells)])
    return table(
        f"data, labels | {own}, against | last | last, averaged weights | "
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
    by_rate,
    on_human_labels,
    reported_on_human_labels,
    human_differences,
    beside_cleanlab,
    at_a_glance,
    at_other_rates,
    trained_on_human_labels,
    trained_long,
    along_long_runs,
    cost_table,
    at_equal_time,
    along_training,
    detection_differences,
    cosine_differences,
    cleanlab_table,
    accuracy_table,
    elr_differences,
    differences_at_other_rates,
    training_differences,
    weights_differences,
    rarest_table,
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
