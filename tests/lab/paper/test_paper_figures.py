"""The paper's figures and their page, from runs whose numbers can be worked out in the head."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import gaf
from gaf_lab.paper import page as paper_page
from gaf_lab.paper import plane, plane_run, sheet
from gaf_lab.paper.figures import draw_item, save_figure
from gaf_lab.paper.interactive import plotly_item
from gaf_lab.paper.items import HUMAN_COLUMN, Item
from gaf_lab.paper.page_table import table_headings, table_rows
from gaf_lab.paper.panels import DISTANCES, measures_with_values
from gaf_lab.paper.places import (
    arms_by_position,
    axis_positions,
    differences_by_position,
    gaf_pairs,
    tick_texts,
)
from gaf_lab.paper.sentences import figure_caption
from gaf_lab.paper.series import all_series
from gaf_lab.paper.table import columns_not_run, table_blocks, table_columns
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import group_by_arm
from gaf_lab.report.charts import STEPS
from gaf_lab.report.palette import CROWD, KNOWN
from helpers.reports import Page, share_of

POLICIES = {
    "averaging": "mean",
    "GAF": "gaf",
    "random subset": "random-subset",
    "random skip": "random-skip",
}
NOISE = Item(
    "fig6",
    "Accuracy per noise level",
    "GAF gains.",
    "against",
    "noise_rate",
    ("test_accuracy",),
    {"GAF": {0.0: 0.63, 0.4: 0.53}, "averaging": {0.0: 0.62, 0.4: 0.38}},
)
TAU = Item(
    "fig7", "Accuracy against tau", "0.97 is best.", "against", "tau", ("test_accuracy",), {}
)
SIZE = Item("fig4", "Distance against b", "It falls.", "against", "b", ("distance_mean",), {})
TRAINING = Item(
    "fig1",
    "Over training",
    "Near 1.",
    "curves",
    None,
    ("test_accuracy", "distance_mean"),
    {"GAF": {"test_accuracy": 0.614}},
)
TABLE = Item(
    "table1",
    "Accuracy at every label error",
    "GAF beats averaging.",
    "table",
    "noise_rate",
    ("test_accuracy",),
    {
        "GAF": {0.0: 0.63, 0.4: 0.53, HUMAN_COLUMN: 0.614},
        "averaging": {0.0: 0.62, 0.4: 0.38, HUMAN_COLUMN: 0.521},
    },
)
PLANE = Item(
    "fig2", "The idea in two dimensions", "Those that disagree are left out.", "plane", None, (), {}
)
NOTES = (
    "Small scale: not the paper's setting.",
    "An MLP on 5000 pictures: neither the paper's network nor its data.",
    "n = 2 seeds.",
)


def run(
    arm="GAF", seed=0, accuracy=(0.5,), heldout=None, distance=None, status="finished", **config
) -> Run:
    """One evaluation per accuracy, every 10 steps and 1000 samples; half of the steps are taken."""
    heldout, distance = heldout or accuracy, distance or [0.9] * len(accuracy)
    evals = [
        {
            "step": 10 * i,
            "steps_taken": 5 * i,
            "samples": 1000 * i,
            "passes": float(i),
            "seconds": 2.0 * i,
            "acceptance": 0.5,
            "heldout_accuracy": held,
            "test_accuracy": value,
            "distance_mean": far,
            "memorised": None,
            "corrected": None,
            "clean_accuracy": None,
            "rows": [2] * 10,
        }
        for i, (value, held, far) in enumerate(zip(accuracy, heldout, distance, strict=True), 1)
    ]
    whole = {
        "dataset": "cifar100",
        "noise": "symmetric",
        "noise_rate": 0.4,
        "model": "resnet18",
        "k": 8,
        "b": 100,
        "tau": 0.97,
        "min_accepted": 2,
        "policy": POLICIES.get(arm, "mean"),
        "seed": seed,
    } | config
    header = {
        "kind": "run",
        "name": f"{arm}-{seed}",
        "arm": arm,
        "config": whole,
        "config_hash": "0",
        "command": "gaf paper fig6",
    }
    return Run(Path(arm), header, evals, {"status": status, "seconds": 2.0 * len(evals)})


def noisy() -> list[Run]:
    """Two seeds of GAF 20 points above averaging at 40%, 2 above at 0%.

    The random subset is between them. The first evaluation is best.
    """
    levels = {
        ("averaging", 0.0): 0.8,
        ("GAF", 0.0): 0.82,
        ("averaging", 0.4): 0.5,
        ("GAF", 0.4): 0.7,
        ("random subset", 0.4): 0.6,
    }
    return [
        run(
            arm,
            seed,
            (level + 0.1, level + 0.02 * seed),
            noise="none" if rate == 0 else "symmetric",
            noise_rate=rate,
        )
        for (arm, rate), level in levels.items()
        for seed in range(2)
    ]


def along_tau() -> list[Run]:
    """GAF at three thresholds; averaging at tau = 2 alone."""
    taus = (0.8, 0.9, 1.0)
    return [run("GAF", seed, (0.6 + tau / 10,), tau=tau) for tau in taus for seed in range(3)] + [
        run("averaging", seed, (0.6,), tau=2.0) for seed in range(3)
    ]


def over_training() -> list[Run]:
    data = {"cifar100": "none", "cifar100n": "human"}
    return [
        run(arm, seed, (0.2, 0.5, 0.4), distance=(1.0, 0.9, 0.98), dataset=name, noise=noise)
        for name, noise in data.items()
        for arm in ("averaging", "GAF")
        for seed in range(2)
    ]


def by_size() -> list[Run]:
    return [
        run("averaging", seed, (0.5, 0.5), distance=(1 - b / 1000, 1 - b / 2000), b=b)
        for b in (50, 100, 200)
        for seed in range(2)
    ]


def human() -> list[Run]:
    return [
        *noisy(),
        *(run(arm, 0, (0.6,), dataset="cifar100n", noise="human") for arm in ("averaging", "GAF")),
    ]


# --- where runs stand ----------------------------------------------------------------------------


def test_human_labels_stand_beside_the_noise_rates_and_clean_ones_at_zero():
    groups = arms_by_position(TABLE, human())
    assert list(groups) == [0.0, 0.4, HUMAN_COLUMN]
    assert [arm.name for arm in groups[0.4]] == ["averaging", "GAF", "random subset"]


def test_micro_batch_sizes_stand_by_their_logarithm_and_thresholds_one_after_the_other():
    assert np.ptp(np.diff(list(axis_positions(SIZE, by_size()).values()))) == 0  # doubled each time
    assert list(axis_positions(TAU, along_tau()).items()) == [
        (0.8, 0),
        (0.9, 1),
        (1.0, 2),
        (2.0, 3),
    ]
    assert axis_positions(NOISE, noisy()) == {0.0: 0.0, 0.4: 40.0}


def test_means_seeds_and_the_papers_values():
    last = {one.arm: one for one in all_series(NOISE, noisy(), "test_accuracy", measures.LAST)}
    gaf = last["GAF"]
    assert [(x, round(mean, 6), n) for x, mean, _, n in gaf.mean] == [
        (0.0, 83.0, 2),
        (0.4, 71.0, 2),
    ]
    assert gaf.mean[0][2] == pytest.approx(np.std([82, 84], ddof=1))
    assert [(x, round(value, 6)) for x, value in gaf.dots] == [
        (0.0, 82),
        (0.0, 84),
        (0.4, 70),
        (0.4, 72),
    ]
    assert gaf.paper == [(0.0, 63.0), (0.4, 53.0)]
    assert last["random subset"].paper == []


def test_last_and_selected_are_panels_of_their_own():
    assert [measure for _, measure in measures_with_values(NOISE, noisy())] == [
        measures.LAST,
        measures.SELECTED,
    ]
    selected = {
        one.arm: one for one in all_series(NOISE, noisy(), "test_accuracy", measures.SELECTED)
    }
    # ten points above each run's first level
    assert [round(mean, 6) for _, mean, *_ in selected["GAF"].mean] == [92, 80]


def test_distances_are_means_over_the_run_lowest_and_last():
    for measure, value in zip(DISTANCES, (0.9375, 0.9, 0.95), strict=True):
        arm = next(arm for x, (arm,) in arms_by_position(SIZE, by_size()).items() if x == 100)
        spread = st.spread_over_seeds(arm, measure)
        assert spread is not None
        assert spread.mean == pytest.approx(
            value if measure.name != "distance" else (0.9 + 0.95) / 2
        )


# --- differences ---------------------------------------------------------------------------------


def test_differences_are_paired_at_each_place():
    found = {
        (x, gap.other): gap for x, gap in differences_by_position(NOISE, noisy(), measures.LAST)
    }
    assert {key: round(gap.mean, 6) for key, gap in found.items()} == {
        (0.0, "averaging"): 0.02,
        (0.4, "averaging"): 0.2,
        (0.4, "random subset"): 0.1,
    }
    assert {gap.arm for gap in found.values()} == {"GAF"}
    assert {gap.n for gap in found.values()} == {2}


def test_averaging_has_no_tau_and_is_compared_at_all_and_drawn_all_along():
    found = differences_by_position(TAU, along_tau(), measures.LAST)
    assert [(x, gap.arm, gap.other, round(gap.mean, 6)) for x, gap in found] == [
        (tau, "GAF", "averaging", round(tau / 10, 6)) for tau in (0.8, 0.9, 1.0)
    ]
    assert [
        one.arm
        for one in all_series(TAU, along_tau(), "test_accuracy", measures.LAST)
        if one.everywhere
    ] == ["averaging"]


def test_variants_are_compared_with_gaf_and_gaf_with_the_others():
    of = group_by_arm(
        [
            run(arm, policy="gaf" if "GAF" in arm else "mean")
            for arm in ("mixup", "GAF, halving", "GAF", "averaging")
        ]
    )
    assert [(one.name, other.name) for one, other in gaf_pairs(of)] == [
        ("GAF", "averaging"),
        ("GAF", "mixup"),
        ("GAF, halving", "GAF"),
    ]


# --- figures -------------------------------------------------------------------------------------

DRAWN = {
    "against noise": (NOISE, noisy),
    "along tau": (TAU, along_tau),
    "by size": (SIZE, by_size),
    "over training": (TRAINING, over_training),
    "table": (TABLE, human),
    "plane": (PLANE, list),
    "without runs": (NOISE, list),
}


def words(figure) -> list[tuple[str, Any]]:
    """The texts of a picture and their boxes in pixels, without ticks beyond an axis's ends."""
    texts = [*figure.texts]
    for ax in figure.axes:
        texts += [
            *(text for text in ax.get_children() if isinstance(text, Text)),
            ax.xaxis.label,
            ax.yaxis.label,
        ]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [
                label
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high
                for label in (tick.label1, tick.label2)
            ]
    return [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_visible() and text.get_text().strip()
    ]


@pytest.mark.parametrize("which", DRAWN)
def test_nothing_written_in_a_picture_touches_anything_else_or_is_cut_off(which):
    item, runs = DRAWN[which]
    figure = draw_item(item, runs(), NOTES)
    figure.canvas.draw()
    boxes = words(figure)
    assert len(boxes) > 2
    for text, box in boxes:
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        # a box is taller than its letters
        assert not a.shrunk(0.95, 0.8).overlaps(b.shrunk(0.95, 0.8)), (one, other)


def test_notes_stand_on_the_picture():
    figure = draw_item(NOISE, noisy(), NOTES)
    written = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert all(note in written for note in NOTES)
    assert "Figure 6. Accuracy per noise level" in written


def test_picture_and_page_show_the_same_numbers():
    figure, drawing = draw_item(NOISE, noisy()), plotly_item(NOISE, noisy())
    for row, ax in enumerate(figure.axes, 1):
        bold = {
            trace.name: trace
            for trace in drawing.data
            if trace.mode == "lines+markers" and trace.yaxis == ("y" if row == 1 else "y2")
        }
        for name, trace in bold.items():
            (line,) = [
                line
                for line in ax.lines
                if line.get_color() == KNOWN[name].light and line.get_linewidth() > 2
            ]
            np.testing.assert_allclose(trace.x, line.get_xdata())
            # rounded to five digits
            np.testing.assert_allclose(trace.y, line.get_ydata(), atol=1e-5)


def test_the_papers_values_are_hollow_and_in_the_arms_colour_and_absent_where_it_has_none():
    diamonds = [trace for trace in plotly_item(NOISE, noisy()).data if trace.meta.get("paper")]
    assert {(trace.name, trace.marker.symbol, trace.marker.color) for trace in diamonds} == {
        (name, "diamond-open", KNOWN[name].light) for name in ("GAF", "averaging")
    }
    assert not [trace for trace in plotly_item(TAU, along_tau()).data if trace.meta.get("paper")]
    hollow = [
        line
        for line in draw_item(NOISE, noisy()).axes[0].lines
        if line.get_marker() == "D" and len(line.get_xdata())
    ]
    assert {(tuple(line.get_ydata()), line.get_markerfacecolor()) for line in hollow} == {
        ((63.0, 53.0), "none"),
        ((62.0, 38.0), "none"),
    }


def test_over_training_each_data_set_has_its_column_and_the_paper_its_place_at_the_end():
    figure, drawing = (
        draw_item(TRAINING, over_training()),
        plotly_item(TRAINING, over_training()),
    )
    assert len(figure.axes) == 4
    assert {"ResNet18 on CIFAR-100", "ResNet18 on CIFAR-100N-Fine"} <= {
        text.get_text() for text in figure.texts
    }
    (first, second) = [trace for trace in drawing.data if trace.meta.get("paper")]
    assert (first.x, first.y, second.y) == ((3.0,), (61.4,), (61.4,))


def test_accuracy_over_training_is_drawn_against_samples_steps_and_time(tmp_path):
    first = save_figure(TRAINING, over_training(), tmp_path, NOTES)
    assert first == tmp_path / "fig1.png"
    assert {path.name for path in tmp_path.iterdir()} == {
        "fig1.png",
        "fig1-steps.png",
        "fig1-time.png",
    }
    bold = next(
        trace
        for trace in plotly_item(TRAINING, over_training(), STEPS).data
        if trace.line.width == 3
    )
    assert bold.x == (5, 10, 15)
    assert share_of(KNOWN["GAF"].light, first) > 0.001


def test_single_seeds_can_be_hidden_and_are_many_as_the_seeds():
    singles = [trace for trace in plotly_item(NOISE, noisy()).data if trace.meta["single"]]
    assert sum(len(trace.x) for trace in singles) == 2 * len(noisy())  # in two panels


# --- the table -----------------------------------------------------------------------------------


def test_the_table_has_the_papers_columns_and_its_lines_beneath():
    assert tick_texts(TABLE, table_columns(TABLE, human())) == ["0", "40", HUMAN_COLUMN]
    (label, rows), (other, _) = table_blocks(TABLE, human())
    assert (label, other) == ("test accuracy, last (%)", "test accuracy, selected on held-out (%)")
    by_name = {row.name: row.cells for row in rows}
    assert by_name["GAF"] == [("83.0", "± 1.4"), ("71.0", "± 1.4"), ("60.0", "")]
    assert by_name["random subset"] == [("\N{EN DASH}", ""), ("61.0", "± 1.4"), ("\N{EN DASH}", "")]
    assert by_name["GAF \N{MINUS SIGN} averaging"] == [
        ("+2.0", "+2.0 to +2.0"),
        ("+20.0", "+20.0 to +20.0"),
        ("0.0", ""),
    ]
    assert by_name["averaging, paper"] == [("62", ""), ("38", ""), ("52.1", "")]
    assert list(by_name)[-2:] == ["GAF, paper", "averaging, paper"]


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    sections = [(item, runs(), NOTES) for item, runs in DRAWN.values()][:-1]
    return paper_page.write_page(
        sections, tmp_path_factory.mktemp("paper"), "The paper, made again"
    )


@pytest.fixture(scope="module")
def shown(made) -> Page:
    return Page(made.read_text(encoding="utf-8"))


def test_the_page_loads_nothing_and_has_every_picture(shown, made):
    loads = [attrs["src"] for tag, attrs in shown.elements if tag == "img" and attrs.get("src")]
    assert len(loads) == 3 + 3 + 1  # three against something; three views over training; the plane
    assert all(value.startswith("data:image/png;base64,") for value in loads)
    links = [attrs["href"] for tag, attrs in shown.elements if tag == "a" and attrs.get("href")]
    assert all(link.startswith("#section-") for link in links)
    assert not {"link", "base", "iframe", "object", "embed", "form"} & set(shown.tags)
    pictures = ("fig1", "fig1-steps", "fig1-time", "fig2", "fig4", "fig6", "fig7", "table1")
    assert {path.name for path in made.parent.glob("*.png")} == {f"{name}.png" for name in pictures}


def test_each_figure_has_its_claim_its_notes_and_what_came_out(shown):
    for item in (NOISE, TAU, SIZE, TRAINING, TABLE, PLANE):
        assert item.claim in shown.text
        assert sheet.heading(item) in shown.text
    assert shown.text.count(NOTES[1]) == 6
    text = shown.text.replace("\xa0", " ")
    assert (
        "GAF \N{MINUS SIGN} averaging runs from +2.0 (0%) to +20.0 (40%) points; "
        "these are too few seeds" in text
    )
    assert (
        "runs from +8.0 (τ = 0.8) to +10.0 (τ = 1) points; "
        "of 3 differences 3 can be told to be above 0, 0 below, 0 neither" in text
    )
    assert "With 3 seeds these intervals are too narrow" in text
    assert (
        "goes from 0.850 (averaging, b = 200) to 0.963 (averaging, b = 50); "
        "the lowest evaluation has 0.800" in text
    )


def test_the_table_beside_a_figure_has_last_selected_paper_and_n():
    assert table_headings(NOISE) == [
        "test accuracy, last (%)",
        "test accuracy, selected on held-out (%)",
        "paper (%)",
        "n",
    ]
    rows = table_rows(NOISE, noisy())
    assert [(row["place"], row["arm"], row["n"]) for row in rows] == [
        ("0", "averaging", 2),
        ("", "GAF", 2),
        ("40", "averaging", 2),
        ("", "GAF", 2),
        ("", "random subset", 2),
    ]
    assert rows[3]["cells"] == [("71.0", "± 1.4"), ("80.0", "± 0.0"), ("53.0", "")]
    assert rows[4]["cells"][2] == ("\N{EN DASH}", "")


def test_the_papers_values_have_a_button_of_their_own(shown):
    buttons = [attrs["data-arm"] for _, attrs in shown.elements if "data-arm" in attrs]
    assert buttons.count("paper") == 2  # figures 1 and 6
    assert buttons.count("GAF") == 3


def test_what_nobody_recorded_has_no_panel_no_column_and_no_picture(tmp_path):
    runs = noisy()
    for each in runs:
        each.evals[:] = [line | {"heldout_accuracy": None} for line in each.evals]
    assert [measure for _, measure in measures_with_values(NOISE, runs)] == [measures.LAST]
    assert len(draw_item(NOISE, runs).axes) == 1
    part = paper_page.make_section(NOISE, runs, NOTES, tmp_path)
    assert part["columns"] == ["test accuracy, last (%)", "paper (%)", "n"]
    assert part["rows"][3]["cells"] == [("71.0", "± 1.4"), ("53.0", "")]
    assert [label for label, _ in table_blocks(TABLE, runs)] == ["test accuracy, last (%)"]
    assert paper_page.make_section(NOISE, [], NOTES, tmp_path)["chart"] is None
    assert draw_item(NOISE, []).axes == []
    curves = over_training()
    for each in curves:
        if each.header["config"]["dataset"] == "cifar100n":
            each.evals[:] = [line | {"distance_mean": None} for line in each.evals]
    assert len(draw_item(TRAINING, curves).axes) == 3
    assert len([key for key in plotly_item(TRAINING, curves).layout if "yaxis" in key]) == 3


def test_the_table_has_the_columns_that_were_run_and_names_the_others():
    runs = noisy()
    assert tick_texts(TABLE, table_columns(TABLE, runs)) == ["0", "40"]
    assert columns_not_run(TABLE, runs) == [f"Not run here: the paper's columns {HUMAN_COLUMN}."]
    assert columns_not_run(TABLE, human()) == []


@pytest.mark.parametrize(("ks", "words"), [((2,), "of a step's two"), ((2, 8), "to the running")])
def test_the_caption_says_what_the_distance_is_to(ks, words):
    runs = [run(arm, k=k) for arm in ("averaging", "GAF") for k in ks]
    assert f"Distance: {words}" in figure_caption(TRAINING, runs)
    assert "Distance" not in figure_caption(NOISE, runs)


def test_a_figure_without_runs_says_so(tmp_path):
    found = Page(paper_page.write_page([(NOISE, [], NOTES)], tmp_path, "Nothing yet").read_text())
    assert "No run of this figure was finished." in found.text
    assert (tmp_path / "fig6.png").is_file()


def test_the_same_runs_give_the_same_page(tmp_path):
    one, other = (
        paper_page.write_page([(TABLE, human(), NOTES)], tmp_path / name, "x").read_text()
        for name in ("a", "b")
    )
    assert one == other


def test_names_are_text_in_the_page_and_in_the_pictures(tmp_path):
    bad = "<img src=x onerror=alert(1)> $\\frac{ {{ 7*7 }}"
    runs = [run(bad, seed, (0.5,), noise_rate=rate) for seed in range(2) for rate in (0.1, 0.4)]
    found = Page(
        paper_page.write_page(
            [(NOISE, runs, (bad,)), (TABLE, runs, (bad,))], tmp_path, bad
        ).read_text()
    )
    assert not [key for _, attrs in found.elements for key in attrs if key.startswith("on")]
    assert found.text.count(" ".join(bad.split())) >= 4


def test_of_many_arms_the_differences_fold_away(tmp_path):
    runs = [run(arm, 0, (0.5,), policy="gaf" if arm.startswith("GAF") else "mean") for arm in KNOWN]
    found = Page(paper_page.write_page([(TABLE, runs, NOTES)], tmp_path, "x").read_text())
    assert len(KNOWN) - 1 > 2 * CROWD
    assert (
        len(
            [
                attrs
                for tag, attrs in found.elements
                if tag == "details" and attrs.get("class") == "printed"
            ]
        )
        == 2
    )


# --- the plane -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> plane_run.PlaneProblem:
    return plane_run.make_plane_problem()


def test_two_fifths_of_the_labels_are_flipped(problem):
    assert float((problem.true != problem.given).double().mean()) == plane_run.RATE


def test_gradients_are_those_of_the_loss(problem):
    w = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(problem.loss(w, problem.given), w)
    torch.testing.assert_close(
        problem.gradient(w.detach(), torch.arange(plane_run.SAMPLES)), expected
    )
    (rest,) = torch.autograd.grad(
        problem.loss(w := problem.optimum(problem.true).requires_grad_(), problem.true), w
    )
    assert float(rest.norm()) < 1e-12  # Newton's method ends at rounding


def test_every_step_is_the_librarys(problem):
    steps = plane_run.descend(problem, gaf.GAF(plane_run.TAU))
    for before, after in itertools.pairwise(steps):
        torch.testing.assert_close(
            after.w, before.w - plane_run.LR * before.decision.weights @ before.rows
        )
    shown = steps[plane_run.step_to_show(steps)]
    assert int(shown.decision.accepted.sum()) == plane_run.K // 2
    torch.testing.assert_close(shown.update, shown.rows[shown.decision.accepted].mean(0))


def test_both_ways_see_the_same_micro_batches(problem):
    one, other = plane_run.descend(problem, gaf.GAF(2.0)), plane_run.descend(problem, gaf.Mean())
    # tau = 2 accepts all
    assert all(torch.allclose(a.w, b.w) for a, b in zip(one, other, strict=True))


def test_the_picture_says_what_was_decided(problem):
    steps = plane_run.descend(problem, gaf.GAF(plane_run.TAU))
    decision = steps[plane_run.step_to_show(steps)].decision
    words = [ax.get_xlabel() for ax in plane.draw_plane(PLANE, ()).axes[: plane_run.K]]
    assert words[0] == "starts the sum"
    for word, accepted, distance in zip(
        words[1:], decision.accepted.tolist()[1:], decision.distances.tolist()[1:], strict=True
    ):
        assert word == f"distance {distance:.2f}: {'accepted' if accepted else 'rejected'}"
        assert (distance <= plane_run.TAU) == accepted
    assert re.search(r"distance \d", words[1])
