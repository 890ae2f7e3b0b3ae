"""The page, the figures and the terminal table, from synthetic runs."""

import csv
import html
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import gaf
from gaf.rules.judging import decide_with_evidence
from gaf_lab.paper.arms import every_arm
from gaf_lab.paper.plans import make_plan
from gaf_lab.paper.scales import SMALL_FASHION
from gaf_lab.records import run as records
from gaf_lab.records.find import find_runs
from gaf_lab.records.run import Run
from gaf_lab.records.score import ACCURACY
from gaf_lab.report import measures, statistics
from gaf_lab.report.arms import Arm, group_by_arm
from gaf_lab.report.cells import cells_of, thresholds
from gaf_lab.report.charts import CHARTS, SAMPLES, STEPS, TIME, caption_of, clock, fit_axis
from gaf_lab.report.conditions import split_conditions
from gaf_lab.report.descriptions import describe
from gaf_lab.report.figures import draw_chart
from gaf_lab.report.interactive import plotly_chart
from gaf_lab.report.labels import LINE, apart, short_names
from gaf_lab.report.page import write_report
from gaf_lab.report.pairs import all_pairs
from gaf_lab.report.palette import KNOWN, palette
from gaf_lab.report.parts import page_title
from gaf_lab.report.sentences import opening
from gaf_lab.report.table import results_table
from gaf_lab.report.text import signed
from gaf_lab.training.interval import Interval
from helpers.reports import POLICIES, Page, head, nine, share_of, simulate

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><!--",
    "{{ 7 * 7 }} %{x} $\\frac{",
    "[red]GAF[/red] &amp;",
    "a name " * 30,
]


def flat_runs(folder: Path, levels: dict[str, list[float]]) -> list[Run]:
    """Runs of one evaluation, of exactly the test accuracies given, seed by seed."""
    runs = []
    for arm, values in levels.items():
        for seed, value in enumerate(values):
            line = {
                "step": 1,
                "steps_taken": 1,
                "samples": 160,
                "test_accuracy": value,
                "heldout_accuracy": None,
                "rows": [8],
            }
            runs.append(
                Run(
                    folder / f"{arm}-{seed}",
                    head(f"{arm}-{seed}", arm, seed),
                    [line],
                    {"status": "finished", "seconds": 1.0},
                )
            )
    return runs


def summary(arms: list[Arm]) -> str:
    """All sentences of the page, each after the point of the grid that it is about."""
    first, rest = opening(arms)
    return " ".join([first, *(f"{where}: {one}" for where, found in rest for one in found)])


def page(runs: list[Run], out: Path, title: str | None = None) -> Page:
    return Page(write_report(runs, out, title).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    return nine(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("report"), "Nine runs").parent


@pytest.fixture(scope="module")
def nine_page(out) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


# --- the page ------------------------------------------------------------------------------------


def test_the_page_loads_nothing(nine_page):
    loads = [
        value
        for tag, attrs in nine_page.elements
        if tag != "a"
        for name, value in attrs.items()
        if name in ("src", "srcset", "href", "data", "action", "poster")
    ]
    assert len(loads) == 5  # the pictures: accuracy against three axes, distance, memorisation
    assert all(value.startswith("data:image/png;base64,") for value in loads)
    assert not {"link", "base", "iframe", "object", "embed", "form"} & set(nine_page.tags)
    assert not any(
        word in css for css in nine_page.raw["style"] for word in ("url(", "@import", "http")
    )


def test_the_browser_is_told_to_load_nothing(nine_page):
    (policy,) = [
        attrs["content"]
        for tag, attrs in nine_page.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "connect-src" not in policy


def test_plotly_is_inside_once_and_the_page_stays_small(nine_page):
    bundles = [script for script in nine_page.raw["script"] if len(script) > 1_000_000]
    assert len(bundles) == 1
    assert not any("http" in script for script in nine_page.raw["script"] if script not in bundles)
    assert "showSendToCloud: false" in nine_page.source
    assert len(nine_page.source.encode()) < 6_000_000


def test_long_runs_do_not_bloat_the_page(tmp_path):
    many = nine(tmp_path)
    for run in many:
        run.evals[:] = [
            line | {"samples": line["samples"] + i} for line in run.evals for i in range(100)
        ]
    assert len(page(many, tmp_path).source.encode()) < 6_000_000


def test_the_same_runs_give_the_same_page(runs, out, nine_page, tmp_path):
    assert page(runs, tmp_path, "Nine runs").source == nine_page.source
    assert all(
        (tmp_path / file.name).read_bytes() == file.read_bytes() for file in out.glob("*.png")
    )


def test_the_title(runs, nine_page, tmp_path):
    assert "<h1>Nine runs</h1>" in nine_page.source
    assert page_title(group_by_arm(runs)) == "Averaging, GAF and random subset"


@pytest.mark.parametrize("name", NASTY)
def test_names_are_shown_as_they_are_and_never_run(name, runs, nine_page, tmp_path):
    header = {"name": name, "commit": name, "command": name, "machine": {name: name}}
    bad = simulate(tmp_path / "run", name, 0, last=0.7, **header)
    found = page([*runs, bad], tmp_path / "out", name)
    assert found.tags.count("script") == nine_page.tags.count("script")
    assert found.tags.count("img") == nine_page.tags.count("img")
    assert not [key for _, attrs in found.elements for key in attrs if key.startswith("on")]
    shown = " ".join(name.split())
    assert found.text.count(shown) >= 6  # title, heading, result, arm, run, conditions or command


def test_hover_labels_show_names_as_they_are(runs, tmp_path):
    bad = simulate(tmp_path / "run", '<b>"bold"</b> %{x}', 0, last=0.7)
    names = {trace.name for trace in plotly_chart([*runs, bad], CHARTS[0]).data}
    (shown,) = names - set(POLICIES)
    assert html.unescape(shown).replace("\N{ZERO WIDTH SPACE}", "") == bad.arm
    assert not {"<", "%{"} & {shown[i : i + n] for n in (1, 2) for i in range(len(shown))}


# --- what it says --------------------------------------------------------------------------------


def test_the_summary_says_how_far_and_how_sure(tmp_path):
    text = summary(
        group_by_arm(flat_runs(tmp_path, {"averaging": [0.6, 0.6, 0.7], "GAF": [0.8, 0.81, 0.92]}))
    )
    assert (
        "GAF's test accuracy is 21.0 points above averaging (95%\xa0CI 20.0 to 22.0, n\xa0=\xa03)"
        in text
    )
    assert "1 case of 4" in text


def test_the_summary_says_where_no_difference_can_be_told(tmp_path):
    text = summary(
        group_by_arm(flat_runs(tmp_path, {"averaging": [0.6, 0.6, 0.7], "GAF": [0.61, 0.61, 0.6]}))
    )
    assert (
        "2.7 points below averaging (95%\xa0CI \N{MINUS SIGN}10.0 to 1.0, n\xa0=\xa03: "
        "no clear difference)" in text
    )


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(1, "One seed (n\xa0=\xa01) cannot establish a difference."), (2, "too few seeds")],
)
def test_the_summary_claims_nothing_from_one_or_two_seeds(seeds, words, tmp_path):
    text = summary(
        group_by_arm(flat_runs(tmp_path, {"averaging": [0.6] * seeds, "GAF": [0.9] * seeds}))
    )
    assert words in text


def test_a_single_seed_is_warned_of_once_and_has_no_deviation(tmp_path):
    runs = [simulate(tmp_path / arm, arm, 0) for arm in POLICIES]
    for text in (page(runs, tmp_path).text.replace("\xa0", " "), " ".join(rendered(runs).split())):
        assert text.count("cannot establish a difference") == text.count("One seed") == 1
        assert "±" not in text
        assert "standard deviation" not in text
        assert "bootstrap" not in text


def test_a_deviation_is_spoken_of_where_there_is_one(runs, nine_page, tmp_path):
    assert "Mean over seeds ± sample standard deviation, of finished runs." in nine_page.text
    assert "± standard deviation" in rendered(runs)
    mixed = [run for run in runs if run.arm == "GAF" or run.seed == 0]
    assert (
        "± sample standard deviation where n > 1, of finished runs." in page(mixed, tmp_path).text
    )


def test_the_page_explains_its_columns(nine_page, tmp_path):
    for name, start in (
        ("Memorised", "of the training samples with a wrong label"),
        ("Accepted", "of all micro-gradients"),
        ("Steps taken", "of all steps"),
    ):
        assert nine_page.text.count(f"{name} : {start}") == 1
    without = page([simulate(tmp_path / "run", "GAF", 0, nulls=("memorised",))], tmp_path)
    assert "Memorised : " not in without.text


def test_the_summary_compares_gaf_with_its_controls(tmp_path):
    text = summary(
        group_by_arm(
            flat_runs(
                tmp_path, {"averaging": [0.6] * 6, "GAF": [0.8] * 6, "random subset": [0.75] * 6}
            )
        )
    )
    assert "20.0 points above averaging" in text
    assert "5.0 points above random subset" in text
    assert "1 case of" not in text  # six seeds are enough


def test_one_arm_is_compared_with_nothing(tmp_path):
    found = page(flat_runs(tmp_path, {"GAF": [0.8, 0.9]}), tmp_path)
    assert "GAF has a test accuracy of 85.0% ± 7.1 at the last evaluation" in found.text
    assert "Paired differences" not in found.text


def test_seeds_that_never_meet_are_said_to_be_incomparable(tmp_path):
    runs = [simulate(tmp_path / "a", "averaging", 0), simulate(tmp_path / "b", "GAF", 1)]
    assert "GAF cannot be compared with averaging" in summary(group_by_arm(runs))


def test_unfinished_runs_are_named_and_left_out(runs, tmp_path):
    more = [
        simulate(tmp_path / "cut", "GAF", 3, status="interrupted", passes=3, last=0.1),
        simulate(tmp_path / "blown", "averaging", 4, status="diverged", passes=5),
        simulate(tmp_path / "begun", "averaging", 5, status="", passes=0),
    ]
    found = page([*runs, *more], tmp_path)
    assert "3 of 12 not finished" in found.text
    assert all(
        word in found.text
        for word in ("interrupted", "diverged", "unfinished", "flatters averaging")
    )
    before, after = (
        statistics.spread_over_seeds(group_by_arm(group)[1], measures.LAST)
        for group in (runs, [*runs, *more])
    )
    assert before == after


def test_an_arm_of_unfinished_runs_is_starred(runs, tmp_path):
    found = page(
        [*runs, simulate(tmp_path / "cut", "random skip", 0, status="", passes=3, last=0.7)],
        tmp_path,
    )
    assert "random skip *" in found.text
    assert "averaging *" not in found.text


@pytest.mark.parametrize("passes", [0, 2])
def test_runs_without_values_still_make_a_page(passes, tmp_path):
    keys = (
        "heldout_accuracy",
        "test_accuracy",
        "memorised",
        "corrected",
        "acceptance",
        "distance_mean",
    )
    found = page([simulate(tmp_path / "run", "GAF", 0, passes=passes, nulls=keys)], tmp_path)
    assert "No test accuracy was recorded yet" in found.text
    assert "figure" not in found.tags  # nothing is drawn of what nobody recorded
    assert not list(tmp_path.glob("*.png"))


def test_conditions_stand_once_where_common_and_by_arm_where_not(runs):
    common, differing = split_conditions(group_by_arm(runs))
    assert ("noise rate", "0.4") in common
    assert ("torch", "2.13.0") in common
    assert differing == [("policy", ["mean", "gaf", "random-subset"])]


def test_a_condition_that_varies_within_an_arm_shows_all_its_values(runs):
    other = Run(Path(), runs[0].header | {"commit": "0a1b2c3d"}, runs[0].evals, runs[0].end)
    _, differing = split_conditions(group_by_arm([*runs, other]))
    assert ("commit", ["b3bf7001 / 0a1b2c3d", "b3bf7001", "b3bf7001"]) in differing


def test_each_command_is_given_once(nine_page):
    assert nine_page.text.count("gaf demo --seeds 3") == 1


def test_each_arm_is_explained(nine_page):
    assert (
        "at most τ = 0.8, one after the other, and skips the step where fewer than 2 agree"
        in nine_page.text
    )
    assert "averages random micro-gradients, as many as GAF accepted" in nine_page.text


def test_no_runs_no_report(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)


# --- distances -----------------------------------------------------------------------------------


def outcomes(policy, rows: list[torch.Tensor]) -> Interval:
    """What `gaf train` gathers from these macro-batches under a policy."""
    found = Interval(torch.zeros(()), [])
    for one in rows:
        found.add(gaf.Outcome.fetch(*decide_with_evidence(policy, gaf.gram(one))))
    return found


@pytest.mark.parametrize("common", [0.1, 0.26, 0.5, 1.0])
def test_the_distance_of_pairs_is_that_of_all_rows_in_every_arm_and_that_to_the_sum_is_not(common):
    draw = torch.Generator().manual_seed(0)
    rows = [
        common * torch.randn(1, 400, generator=draw) + torch.randn(8, 400, generator=draw)
        for _ in range(200)
    ]
    units = [torch.nn.functional.normalize(one.double(), dim=1) for one in rows]
    true = statistics.Spread.of(1 - float((u.sum(0).square().sum() - 8) / 56) for u in units).mean
    lines = [outcomes(policy, rows).line(20, 0.0) for policy in (gaf.Mean(), gaf.GAF(tau=0.8))]
    for line in lines:
        assert line["distance_pairs"] == pytest.approx(true, abs=0.003)  # of 200 x 28 pairs
    if common == 0.26:
        assert abs(lines[0]["distance_mean"] - lines[1]["distance_mean"]) > 0.03


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ({"distance_pairs": 0.9, "noise_scale": 60.0, "distance_mean": 0.8}, 0.9),
        ({"distance_pairs": None, "noise_scale": 60.0, "distance_mean": 0.8}, None),
        ({"noise_scale": 60.0, "distance_mean": 0.8}, 0.75),  # B / (b + B), b = 20
        ({"noise_scale": None, "distance_mean": 0.8}, 1.0),  # no signal was made out
        ({"noise_scale": None, "distance_mean": None}, None),  # nothing was compared
        ({"distance_mean": 0.8}, None),
    ],
)
def test_older_records_tell_the_distance_of_pairs_by_the_noise_scale(line, value, tmp_path):
    run = Run(tmp_path, head("x", "GAF", 0), [line], None)
    assert measures.value_in(run, line, measures.PAIR_DISTANCE) == value


def test_the_caption_says_what_each_distance_is_to_and_which_records_are_older(runs):
    (chart,) = [chart for chart in CHARTS if chart.name == "distance"]
    assert "under averaging that is the sum of all earlier" in caption_of(chart, runs)
    newer = [
        Run(r.folder, r.header, [line | {measures.PAIR_DISTANCE: 0.9} for line in r.evals], r.end)
        for r in runs[1:]
    ]
    assert "records" not in caption_of(chart, newer)
    assert "The records of these runs are older" in caption_of(chart, runs)
    assert "The records of 1 of 9 runs are" in caption_of(chart, [runs[0], *newer])
    assert "records" not in caption_of(CHARTS[0], runs)


# --- a grid --------------------------------------------------------------------------------------


def across(folder: Path, field: str, values: tuple[float, ...]) -> list[Run]:
    """Averaging, GAF and its random subset at each value of a field, three seeds each."""
    runs = []
    for place, value in enumerate(values):
        for arm, level in (("averaging", 0.5), ("GAF", 0.6 + 0.1 * place), ("random subset", 0.55)):
            for run in flat_runs(folder, {arm: [level] * 3}):
                config = {field: value} | (
                    {} if arm != "random subset" else {"replay": f"GAF-{place}-{run.seed}"}
                )
                run.header["config"] |= config
                runs.append(
                    Run(folder / f"{arm}-{place}-{run.seed}", run.header, run.evals, run.end)
                )
    return runs


def test_at_several_taus_each_is_compared_with_averaging_and_with_its_own_control(tmp_path):
    of = group_by_arm(across(tmp_path, "tau", (0.5, 0.9)))
    assert {(one.name, other.name) for one, other in all_pairs(of)} == {
        ("GAF, tau 0.5", "averaging"),
        ("GAF, tau 0.9", "averaging"),
        ("random subset, tau 0.5", "averaging"),
        ("random subset, tau 0.9", "averaging"),
        ("GAF, tau 0.9", "GAF, tau 0.5"),
        ("GAF, tau 0.5", "random subset, tau 0.5"),
        ("GAF, tau 0.9", "random subset, tau 0.9"),
    }
    text = summary(of)
    assert "GAF, tau 0.9's test accuracy is 20.0 points above averaging" in text
    assert text.count("random subset, tau 0.9") == text.count("random subset, tau 0.5") == 1
    without = group_by_arm(
        run for run in across(tmp_path, "tau", (0.5, 0.9)) if run.arm != "averaging"
    )
    assert ("random subset, tau 0.9", "GAF, tau 0.5") not in [
        (one.name, other.name) for one, other in all_pairs(without)
    ]


def test_across_noise_levels_only_arms_of_one_level_are_compared(tmp_path):
    of = group_by_arm(across(tmp_path, "noise_rate", (0.2, 0.4)))
    found = [
        (one.name.partition(", ")[2], other.name.partition(", ")[2]) for one, other in all_pairs(of)
    ]
    assert (
        found
        == [("noise rate 0.2", "noise rate 0.2")] * 3 + [("noise rate 0.4", "noise rate 0.4")] * 3
    )
    assert (
        "noise rate 0.4: At the last evaluation, GAF's test accuracy is 20.0 points above "
        "averaging (" in summary(of)
    )


def test_the_summary_of_many_points_counts(tmp_path):
    text = summary(group_by_arm(across(tmp_path, "noise_rate", (0.1, 0.2, 0.3, 0.4))))
    assert (
        "Of 8 arms compared with averaging in test accuracy at the last evaluation, "
        "8 are clearly above" in text
    )


def test_the_page_of_a_grid_names_each_run_by_its_arm(tmp_path):
    runs = across(tmp_path, "tau", (0.5, 0.9))
    found = page(runs, tmp_path)
    arms = [attrs["data-arm"] for tag, attrs in found.elements if "data-arm" in attrs]
    assert arms == [arm.name for arm in group_by_arm(runs)]
    assert "GAF, tau 0.9 0 finished" in found.text


def points(folder: Path) -> list[Run]:
    """Averaging and GAF, on clean labels and with a noise rate of 0.4."""
    found = []
    for rate in (0.0, 0.4):
        for arm in ("averaging", "GAF"):
            nulls = () if rate else ("memorised", "corrected")
            run = simulate(folder / f"{arm}-{rate}", arm, 0, nulls=nulls)
            run.header["config"]["noise_rate"] = rate
            found.append(run)
    return found


def test_each_noise_rate_has_a_panel_and_what_nobody_recorded_has_none(tmp_path):
    runs = points(tmp_path)
    titles = {chart.name: [cell.title for cell in cells_of(runs, chart)] for chart in CHARTS}
    assert titles == {
        "accuracy": ["test accuracy (%), noise rate 0", "test accuracy (%), noise rate 0.4"],
        "distance": [f"mean distance to the running sum, noise rate {rate}" for rate in (0, 0.4)],
        "memorisation": ["memorised (%), noise rate 0.4", "corrected (%), noise rate 0.4"],
    }
    for chart in CHARTS:
        assert len(draw_chart(runs, chart).axes) == len(titles[chart.name])
        shown = plotly_chart(runs, chart)
        assert {trace.name for trace in shown.data} == {"averaging", "GAF"}
        assert [note.text for note in shown.layout.annotations][:2] == titles[chart.name]


def test_a_page_of_points_names_methods_and_leaves_no_column_of_dashes(tmp_path):
    found = page(points(tmp_path), tmp_path)
    chips = [attrs["data-arm"] for _, attrs in found.elements if "data-arm" in attrs]
    assert chips == ["averaging", "GAF"]
    assert "4 runs of 2 methods at 2 points" in found.text
    assert "\N{EN DASH}" not in found.text.partition("Paired differences")[0]
    assert "GAF \N{MINUS SIGN} averaging, noise rate 0.4" in found.text


def test_without_an_interval_there_is_no_column_for_one(tmp_path):
    assert "95% interval" not in page(points(tmp_path), tmp_path).text


@pytest.mark.parametrize("passes", [1, 40])
def test_every_axis_has_numbers(passes, tmp_path):
    runs = [simulate(tmp_path / arm, arm, 0, passes=passes) for arm in POLICIES]
    for run in runs:
        run.evals[:] = [line | {"memorised": 0.0, "distance_pairs": 0.9} for line in run.evals]
    for chart in CHARTS:
        figure = draw_chart(runs, chart)
        figure.canvas.draw()
        for ax in figure.axes:
            for axis in (ax.xaxis, ax.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = axis.get_major_ticks()
                shown = [t.label1.get_text() for t in ticks if low <= t.get_loc() <= high]
                assert len(list(filter(None, shown))) >= 2
                assert all(t.label1.get_visible() for t in ticks)
        layout = plotly_chart(runs, chart).layout
        axes = [layout[key] for key in layout if key.startswith(("xaxis", "yaxis"))]
        assert len(axes) == 2 * len(chart.panels)
        assert all(axis.showticklabels is not False for axis in axes)


# --- every arm of the paper's table 1 ------------------------------------------------------------


@pytest.fixture(scope="module")
def table_1(tmp_path_factory) -> Page:
    """The page of 66 arms at three noise rates."""
    place = Path(__file__).parents[3] / "results" / "table1-small.jsonl"
    return page(find_runs([place]), tmp_path_factory.mktemp("table1"))


def test_the_first_table_comes_after_few_words_and_the_page_is_small(table_1):
    start = table_1.source[table_1.source.index("<body") : table_1.source.index("<table")]
    assert 30 < len(re.sub(r"<[^>]*>", " ", start).split()) <= 120
    assert len(table_1.source.encode()) <= 4_000_000


def test_methods_keep_their_colours_whatever_the_noise_rate(table_1):
    chips = [attrs["data-arm"] for _, attrs in table_1.elements if "data-arm" in attrs]
    assert chips == list(dict.fromkeys(config.arm for config in make_plan("table1", "small")))
    shown = re.findall(r'--light: (#\w+); --dark: #\w+"></span>([^<]+)</label>', table_1.source)
    assert shown == [(KNOWN[name].light, name) for name in chips]


def test_the_picker_is_of_native_checkboxes(table_1):
    boxes = [attrs for tag, attrs in table_1.elements if tag == "input"]
    assert {attrs["type"] for attrs in boxes} == {"checkbox"}
    assert all("checked" in attrs and "disabled" not in attrs for attrs in boxes)


def test_the_table_is_there_for_other_programs(runs, out, nine_page):
    links = [attrs["href"] for tag, attrs in nine_page.elements if tag == "a"]
    assert links == ["report.csv", "report.tex"]
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == list(POLICIES)
    for row, arm in zip(rows, group_by_arm(runs), strict=True):
        spread = statistics.spread_over_seeds(arm, measures.LAST)
        assert float(row["test accuracy, last (%)"]) == round(100 * spread.mean, 1)
        assert float(row["test accuracy, last (%), deviation"]) == round(100 * spread.deviation, 1)
        assert row["seeds"] == "3"


# --- numbers as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.25, "+1.2"), (-3.0, "\N{MINUS SIGN}3.0"), (0.04, "0.0"), (-0.04, "0.0"), (0.0, "0.0")],
)
def test_signed(value, text):
    assert signed(value) == text


@pytest.mark.parametrize(("longest", "unit"), [(60, "s"), (600, "min"), (36000, "h")])
def test_time_has_a_fitting_unit(longest, unit):
    assert clock(longest)[0] == unit


# --- the figures ---------------------------------------------------------------------------------


def test_every_figure_shows_every_arm(out):
    for name in ("accuracy", "distance", "memorisation"):
        shades = palette(list(POLICIES)).values()
        # a bold line: 0.3% of the pixels
        assert all(share_of(shade.light, out / f"{name}.png") > 0.001 for shade in shades)


def test_pages_and_pictures_show_the_same_numbers(runs):
    gaf = next(arm for arm in group_by_arm(runs) if arm.name == "GAF")
    curve = statistics.curve(gaf, "test_accuracy")
    (bold,) = [
        trace
        for trace in plotly_chart(runs, CHARTS[0]).data
        if trace.name == "GAF" and trace.showlegend
    ]
    line = max(
        (
            line
            for line in draw_chart(runs, CHARTS[0]).axes[0].lines
            if line.get_color() == "#1559c9"
        ),
        key=lambda a: a.get_linewidth(),
    )
    np.testing.assert_allclose(bold.y, curve.mean * 100, atol=1e-5)  # rounded to five digits
    np.testing.assert_allclose(line.get_ydata(), curve.mean * 100)
    np.testing.assert_allclose(bold.x, line.get_xdata())


def test_the_circle_is_where_the_held_out_labels_select(runs):
    figure = plotly_chart(runs[:1], CHARTS[0])
    (circle,) = [trace for trace in figure.data if trace.mode == "markers"]
    assert circle.x == (runs[0].selected["samples"] / 1000,)
    assert circle.y == (runs[0].selected["test_accuracy"] * 100,)


@pytest.mark.parametrize(("tau", "lines"), [(0.8, 1), (2.0, 0), (None, 0)])
def test_tau_is_drawn_for_gaf_alone(tau, lines, tmp_path):
    runs = [simulate(tmp_path / arm, arm, 0) for arm in ("averaging", "GAF")]
    for run in runs:
        run.header["config"]["tau"] = tau
    assert len(plotly_chart(runs, CHARTS[1]).layout.shapes) == lines
    assert thresholds(group_by_arm(runs[:1])) == {}


def test_an_arm_keeps_its_colour_whatever_it_is_shown_with():
    assert palette(["GAF", "averaging"])["GAF"] == palette(["x", "random skip", "GAF"])["GAF"]
    names = [*KNOWN, "GAF 0.7", "GAF 0.9", "one", "two", "three", "four"]
    assert len(set(palette(names).values())) == len(names)


def test_a_colour_is_a_function_of_the_name_alone_and_thresholds_differ():
    taus = [f"GAF, tau {tau:g}" for tau in (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1, 1.05)]
    names = [*taus, "another", *(f"random subset, tau {tau}" for tau in (0.5, 0.9))]
    shown = palette(names)
    assert all(palette([name])[name] == shown[name] for name in names)
    for ground in ("light", "dark"):
        places = [oklab(getattr(shown[name], ground)) for name in names]
        apart = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2))
        assert apart > 0.02  # just seen


def oklab(colour: str) -> np.ndarray:
    """Lightness and two opponent colours, in which equal distances look about equal.

    Ottosson 2020, bottosson.github.io/posts/oklab.
    """
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return opponents @ np.cbrt(cones @ linear)


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_no_two_arms_look_alike(ground):
    places = [oklab(getattr(shade, ground)) for shade in KNOWN.values()]
    # 0.02 is just seen
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2)) > 0.07


# --- against steps and time ----------------------------------------------------------------------


def test_accuracy_is_drawn_against_samples_steps_and_time(runs, out):
    chart = CHARTS[0]
    for axis, column, unit in (
        (SAMPLES, "samples", 1000),
        (STEPS, "steps_taken", 1),
        (TIME, "seconds", 1),
    ):
        (bold,) = [
            trace
            for trace in plotly_chart(runs, chart, axis).data
            if trace.name == "GAF" and trace.showlegend
        ]
        assert bold.x[-1] == runs[3].evals[-1][column] / unit
        assert (out / f"{chart.stem(axis)}.png").is_file()


def test_the_axis_of_time_has_a_fitting_unit(runs):
    long = Run(
        Path(),
        runs[0].header,
        [line | {"seconds": line["seconds"] * 60} for line in runs[0].evals],
        runs[0].end,
    )
    assert (
        fit_axis(TIME, [runs[0]]).label,
        fit_axis(TIME, [long]).label,
    ) == ("time (s)", "time (min)")
    assert fit_axis(SAMPLES, [long]) == SAMPLES


# --- many arms -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> list[Run]:
    """Every known arm, two seeds each."""
    folder = tmp_path_factory.mktemp("crowd")
    found = [
        simulate(folder / f"{arm}-{seed}".replace(" ", "-"), arm, seed, last=0.6 + 0.012 * i)
        for i, arm in enumerate(KNOWN)
        for seed in range(2)
    ]
    for run in found:
        run.header["config"]["policy"] = (
            "gaf" if run.arm.startswith("GAF") else POLICIES.get(run.arm, "mean")
        )
    return found


def test_many_arms_are_compared_in_a_number_of_pairs_that_grows_as_they_do(crowd):
    of = group_by_arm(crowd)
    names = [(one.name, other.name) for one, other in all_pairs(of)]
    # with averaging; with GAF; one with its namesake
    assert len(names) == len(set(names)) == 2 * len(of) - 3 + 1
    assert {
        ("GAF", "averaging"),
        ("GAF", "random subset"),
        ("GAF", "SAM"),
        ("GAF, halving", "GAF"),
        ("SAM", "averaging"),
    } <= set(names)
    assert ("GAF, AdamW", "averaging, AdamW") in names
    assert ("GAF, halving", "random subset") not in names


def test_of_many_arms_only_the_means_are_drawn(crowd, runs):
    for some, lines in ((runs, 4 * 3), (crowd, len(KNOWN))):
        axes = draw_chart(some, CHARTS[0]).axes[0]
        assert len([line for line in axes.lines if line.get_transform() == axes.transData]) == lines
    singles = [trace for trace in plotly_chart(crowd, CHARTS[0]).data if trace.meta["single"]]
    # two runs and their selected evaluations, which the page hides
    assert len(singles) == 3 * len(KNOWN)


def test_names_of_many_arms_do_not_touch(crowd):
    axes = draw_chart(crowd, CHARTS[0]).axes[0]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == len(KNOWN)
    inches = axes.bbox.height / axes.figure.dpi
    assert min(b - a for a, b in itertools.pairwise(heights)) * inches > LINE - 1e-9
    assert heights[0] >= 0


def test_the_summary_of_many_arms_speaks_of_gaf_and_its_controls_and_counts_the_rest(crowd):
    text = summary(group_by_arm(crowd))
    assert "random subset" in text
    assert "SAM" not in text
    assert f"Of {len(KNOWN) - 1} arms compared with averaging" in text


def test_the_page_of_many_arms_says_in_what_each_departs_from_averaging(crowd, tmp_path):
    found = page(crowd, tmp_path)
    assert "What differs from averaging" in found.text
    assert found.tags.count("details") == len(measures.compared_measures(ACCURACY))
    assert [attrs["data-arm"] for tag, attrs in found.elements if "data-arm" in attrs] == list(
        KNOWN
    )


@pytest.mark.parametrize(
    "heights", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.01, 0.9, 0.99, 1.0], [0.97, 0.98, 0.99]]
)
def test_labels_are_moved_apart_and_stay_in_order(heights):
    moved = apart(heights, 0.1)
    assert all(b - a > 0.1 - 1e-12 for a, b in itertools.pairwise(moved))
    assert max(moved) <= 1


@pytest.mark.parametrize(
    "names",
    [
        [f"GAF with another technique of a long name, number {i}" for i in range(20)],
        [f"{'a' * i}-{'b' * 40}-{i}-{'c' * 40}" for i in range(20)],
        ["x" * 120, "short", "x" * 121],
    ],
)
def test_labels_keep_what_tells_arms_apart(names):
    found = short_names(names)
    assert len(set(found.values())) == len(names)
    assert found.get("short", "short") == "short"


def test_labels_with_room_stay_and_a_crowd_keeps_its_centre():
    assert apart([0.1, 0.3, 0.9], 0.1) == pytest.approx([0.1, 0.3, 0.9])
    assert apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


# --- the terminal --------------------------------------------------------------------------------


def rendered(runs: list[Run]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(runs))
    return console.export_text()


def test_the_table_fits_a_terminal_and_holds_the_numbers(tmp_path):
    text = rendered(flat_runs(tmp_path, {"averaging": [0.6, 0.6, 0.7], "GAF": [0.8, 0.81, 0.92]}))
    assert "63.3 ± 5.8" in text
    assert "84.3 ± 6.7" in text
    assert "+21.0 (95% CI 20.0 to 22.0, n = 3)" in text


def test_the_table_takes_names_as_text(tmp_path):
    assert "[red]x[/red]" in rendered([simulate(tmp_path / "run", "[red]x[/red]", 0, last=0.7)])


# --- the process ---------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_early_and_pyplot_never(runs, tmp_path):
    code = f"""
import sys
from pathlib import Path
from gaf_lab.records.find import find_runs
from gaf_lab.report.page import write_report
assert not {{"matplotlib", "plotly", "rich", "jinja2"}} & sys.modules.keys()
write_report(find_runs([Path({str(runs[0].folder.parent)!r})]), Path({str(tmp_path)!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_arm_of_the_lab_is_described_as_what_it_is(tmp_path):
    texts = {}
    for config in every_arm(SMALL_FASHION):
        run = records.Run(tmp_path, {"arm": config.arm, "config": config.plain()}, [], None)
        texts[config.arm] = describe(Arm(config.arm, [run]))
    assert "policy" not in " ".join(texts.values())
    sizes = {
        "GAF, k = 2",
        "GAF, k = 4",
        "larger batch",
        "averaging, AdamW",
        "GAF, AdamW",
    }  # these differ in what stands under "What differs"
    told = [text for name, text in texts.items() if name not in sizes]
    assert len(set(told)) == len(told)
    assert "GAF's in a recorded run" in texts["random skip"]
    assert "SAM" in texts["SAM"]
