"""The audit: what a score is, that wrong labels are found, what is reported, the page's table."""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import gaf
from gaf_lab.commands.main import main
from gaf_lab.data.problem import make_problem
from gaf_lab.data.sets import load_dataset
from gaf_lab.experiments import audit_figures
from gaf_lab.experiments.audit import Tally, audit_labels
from gaf_lab.experiments.audit_report import (
    RANKING,
    SCORES,
    closing_words,
    describe_lead,
    mean_and_deviation,
    usual_lead,
)
from gaf_lab.experiments.label_quality import count_wrong_labels, label_quality, mark_lowest
from gaf_lab.report.figures import canvas
from gaf_lab.report.statistics import bootstrap
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig

ROOT = Path(__file__).parents[3]
SMALL = TrainConfig(dataset="digits", k=4, b=8, passes=3.0, eval_every=1.0, tau=0.9)


def outcome(distances: list[float], tau: float = 0.9) -> gaf.Outcome:
    accepted = [d <= tau for d in distances]
    return gaf.Outcome(
        any(accepted), accepted, distances, [0.0] * len(distances), [1.0] * len(distances), 1.0, tau
    )


def written_out(
    steps: list[tuple[list[torch.Tensor], list[float]]], n: int, of: Callable[[float], float]
) -> list[float]:
    """Each sample's mean excess over the last 100 steps, one appearance at a time.

    of: the value of a compared row, by its distance.
    """
    excess: list[list[float]] = [[] for _ in range(n)]
    rows = [[of(d) for d in sorted(d for d in distances if d == d)[1:]] for _, distances in steps]
    rows = [[*row, statistics.fmean(row)] for row in rows]  # the start's
    for t, (batches, distances) in enumerate(steps):
        usual = statistics.fmean(v for row in rows[max(t - 99, 0) : t + 1] for v in row)
        for batch, d in zip(batches, distances, strict=True):
            for sample in batch.tolist() if d == d else []:
                excess[sample].append((of(d) if d > 0 else statistics.fmean(rows[t])) - usual)
    return [statistics.fmean(one) if one else 0.0 for one in excess]


def test_a_score_is_the_mean_excess_over_the_last_hundred_steps_of_the_samples_micro_batches():
    draw, tally, steps = torch.Generator().manual_seed(0), Tally(9), []
    for t in range(130):
        distances = (0.6 + 0.7 * torch.rand(4, generator=draw)).tolist()
        distances[0] = 0.0 if t % 3 else math.nan
        distances[1] = distances[1] if t % 3 else 0.0
        # no micro-batch holds sample 8
        steps.append((list(torch.randint(8, (4, 3), generator=draw)), distances))
        tally.add(steps[-1][0], outcome(distances))
    assert tally.distance_scores().tolist() == pytest.approx(written_out(steps, 9, lambda d: d))
    assert tally.rejection_scores().tolist() == pytest.approx(
        written_out(steps, 9, lambda d: float(d > 0.9))
    )
    assert tally.appearances[8] == tally.distance_scores()[8] == 0


def test_of_two_micro_batches_both_are_as_far_from_each_other():
    tally = Tally(4)
    tally.add([torch.tensor([0]), torch.tensor([1])], outcome([0.0, 0.4]))
    tally.add([torch.tensor([2]), torch.tensor([3])], outcome([0.0, 1.2]))
    # 1.2 less the mean of both steps
    assert tally.distance_scores().tolist() == pytest.approx([0, 0, 0.4, 0.4])
    assert tally.rejection_scores().tolist() == pytest.approx([0, 0, 0.5, 0.5])


@pytest.mark.parametrize("limit", [0, 300])
def test_the_list_names_samples_as_the_data_set_does(limit):
    problem = make_problem(dataclasses.replace(SMALL, limit=limit), None, torch.device("cpu"))
    data = load_dataset("digits", None)
    torch.testing.assert_close(data.train_x[problem.origin], problem.train.x, rtol=0, atol=0)
    assert data.train_y[problem.origin].equal(problem.train.clean)


def test_a_step_in_which_nothing_was_compared_says_nothing():
    tally = Tally(4)
    tally.add([torch.tensor([0]), torch.tensor([1])], outcome([0.0, math.nan]))
    tally.add([torch.tensor([0]), torch.tensor([1])], outcome([math.nan, math.nan]))
    assert (
        tally.appearances.sum()
        == tally.distance_scores().abs().sum()
        == tally.rejection_scores().abs().sum()
        == 0
    )


def test_samples_whose_micro_batches_point_elsewhere_come_out_on_top():
    """One sample of 40 turns the gradient of every micro-batch that holds it."""
    generator, tally = torch.Generator().manual_seed(0), Tally(40)
    for _ in range(200):
        batches = list(torch.randperm(40, generator=generator).view(8, 5))
        rows = torch.tensor([[1.0, 0.0]] * 8) + 0.3 * torch.randn(8, 2, generator=generator)
        rows[[7 in batch.tolist() for batch in batches].index(True)] = torch.tensor([-0.2, 1.0])
        decision = gaf.GAF(0.9)(gaf.gram(rows))
        tally.add(batches, outcome(decision.distances.tolist()))
    for value in (tally.distance_scores(), tally.rejection_scores()):
        assert int(value.argmax()) == 7


def test_the_losses_are_those_of_the_model_and_the_run_is_that_of_gaf_train(tmp_path):
    from gaf_lab.training.run import train
    from helpers.fakes import Silent

    found = audit_labels(SMALL, None, lambda *at: None)
    run = train(SMALL, tmp_path / "run", Silent())
    assert found.selected == pytest.approx(run.selected["heldout_accuracy"])
    assert found.taken == pytest.approx(run.evals[-1]["steps_taken"] / run.evals[-1]["step"])
    assert all(len(value) == len(found.flipped) for value in found.scores.values())
    assert found.flipped.double().mean() == pytest.approx(0.4, abs=0.03)
    known = found.problem.train
    assert bool(((known.observed != known.clean).cpu() == found.flipped).all())


def test_the_command_writes_a_ranked_list_a_figure_and_lines(tmp_path, capsys):
    words = [
        "audit",
        "--dataset",
        "digits",
        "--k",
        "4",
        "--b",
        "8",
        "--passes",
        "2",
        "--eval-every",
        "1",
        "--out",
        str(tmp_path),
        "--seeds",
        "2",
    ]
    assert main(words) == 0
    rows = list(csv.DictReader((tmp_path / "samples.csv").open()))
    assert list(rows[0])[:5] == [
        "index",
        "given_label",
        "predicted_label",
        "label_quality",
        "is_label_issue",
    ]
    assert {"loss", "loss_selected", "loss_averaging", "distance", "rejection"} < rows[0].keys()
    quality = [float(row["label_quality"]) for row in rows]
    assert quality == sorted(quality)
    assert all(0 <= value <= 1 for value in quality)
    assert {row["flipped"] for row in rows} == {"0", "1"}
    data = load_dataset("digits", None).train_y.tolist()
    for row in rows:
        assert int(row["true_label"]) == data[int(row["index"])]
        assert (row["given_label"] != row["true_label"]) == (row["flipped"] == "1")
        # where another class was more probable, its label is the predicted one
        assert (row["predicted_label"] != row["given_label"]) == (float(row["label_quality"]) < 0.5)
    marked = [row["is_label_issue"] for row in rows]
    assert marked == sorted(marked, reverse=True)
    assert len({row["index"] for row in rows}) == len(rows)
    assert imread(tmp_path / "audit.png").shape[1] == 1500  # two panels
    for picture in ("audit.png", "suspects.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()][1:]
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["issues"]["count"] == marked.count("1")
    right = sum(row["flipped"] == row["is_label_issue"] == "1" for row in rows)
    assert lines[0]["issues"]["precision"] == pytest.approx(right / marked.count("1"))
    assert lines[0]["issues"]["recall"] == pytest.approx(right / lines[0]["flipped"])
    out = capsys.readouterr().out
    assert out.startswith("digits, 40% symmetric label noise; mlp; GAF, k = 4, b = 8\n")
    assert "samples.csv is ranked by label quality: AUROC 0." in out
    assert f"The 50 first as pictures: {tmp_path / 'suspects.png'}" in out


def test_the_difference_is_paired_by_seed():
    lines = [
        {"auroc": {"quality": s, "loss_averaging": u}}
        for s, u in ((0.5, 0.9), (0.6, 1.0), (0.4, 0.8))
    ]
    # the spread between seeds is common to both
    words = "so 0.400 more (95% interval over 3 seeds: +0.400 to +0.400)"
    assert describe_lead(lines) == words
    assert describe_lead(lines[:1]) == "so 0.400 more"
    assert describe_lead([line_of(quality=0.9, loss_averaging=0.7)]) == "so 0.200 less"
    assert describe_lead([line_of()]) == "which is the same"


def test_label_quality_is_the_margin_of_the_given_label():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    quality = label_quality(p, torch.tensor([0, 1, 0, 0]))
    assert quality.tolist() == pytest.approx([0.75, 0.25, 0.5, 0.0])


def test_the_confident_joint_counts_what_looks_as_much_of_another_class_as_that_class_itself_does():
    """One label 0 is wrong: it is as much of class 1 as those labelled 1 are.

    One more is undecided, and counts as neither.
    """
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.5, 0.5], [0.2, 0.8], [0.1, 0.9]])
    given = torch.tensor([0, 0, 0, 0, 1, 1])
    # Means: 0.575 of class 0, 0.85 of class 1. Of the labels 0 three are sure, one of them of
    # class 1; of the labels 1 one is sure.
    assert count_wrong_labels(p, given) == round(4 * 1 / 3)
    assert count_wrong_labels(p[:, [1, 0]], 1 - given) == 1  # classes are but names


def test_a_class_that_no_sample_has_as_its_label_is_nobodys():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    assert count_wrong_labels(p, torch.tensor([0, 0])) == 0
    assert mark_lowest(torch.tensor([0.3, 0.1, 0.2]), 2).tolist() == [False, True, True]


@pytest.mark.parametrize(("rate", "most"), [(0.4, 1.0), (0.1, 1.0), (0.0, 0.01)])
def test_about_as_many_are_marked_as_are_wrong_and_these_are_mostly_wrong(rate, most):
    config = dataclasses.replace(SMALL, b=16, passes=6.0, noise_rate=rate)
    found = audit_labels(config, None, lambda *at: None)
    line = found.line()
    assert line["issues"]["count"] <= most * line["samples"]
    if rate:
        assert line["issues"]["count"] == pytest.approx(line["flipped"], rel=0.4)
        assert line["issues"]["precision"] > 0.85
        assert line["issues"]["recall"] > 0.6
        assert line["auroc"]["quality"] > 0.97
    else:
        assert line["issues"]["precision"] is line["issues"]["recall"] is None


def test_the_file_is_ranked_by_the_best_of_what_was_measured():
    """On every setting of the page, label quality is at most a hundredth below the best.

    It is far better than the filter's distance.
    """
    text = (ROOT / "results" / "audit.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, text) if line["kind"] == "audit"]
    assert len(lines) >= 12
    for line in lines:
        assert line["auroc"][RANKING] >= max(line["auroc"].values()) - 0.01
        assert line["auroc"][RANKING] > line["auroc"]["distance"] + 0.2


def line_of(**auroc):
    known = dict.fromkeys(SCORES, 0.6) | auroc
    return {"auroc": known, "issues": {"count": 40, "precision": 0.9, "recall": 0.75}}


def test_the_closing_words_by_hand():
    assert closing_words([line_of(quality=0.98, loss_averaging=0.994)]) == (
        "samples.csv is ranked by label quality: AUROC 0.980. "
        "The mean loss of plain averaging, the usual way, has 0.994, so 0.014 more. "
        "is_label_issue marks the first 40 lines. 90% of these are wrong. "
        "They hold 75% of all wrong labels. The filter's own distance has 0.600."
    )


def test_where_nothing_is_marked_the_closing_words_say_so():
    line = line_of()
    line["issues"] = {"count": 0, "precision": None, "recall": 0.0}
    assert " is_label_issue marks no line. " in closing_words([line])


@pytest.mark.parametrize(
    "changes", [{}, {"dataset": "noise", "limit": 40, "noise": "none", "b": 4}]
)
def test_the_sheet_has_a_picture_for_each_suspect_with_both_labels(tmp_path, monkeypatch, changes):
    """Of one channel and of three; also where there are fewer samples than places."""
    kept = []
    monkeypatch.setattr(
        audit_figures, "canvas", lambda *size: kept.append(canvas(*size)) or kept[-1]
    )
    found = audit_labels(dataclasses.replace(SMALL, passes=1.0, **changes), None, lambda *at: None)
    audit_figures.draw_suspects(found, tmp_path / "suspects.png")
    shown = [ax for ax in kept[0].axes if ax.images]
    assert len(shown) == min(audit_figures.SUSPECTS, len(found.flipped))
    for ax, i in zip(shown, found.order, strict=False):
        train = found.problem.train
        assert ax.get_title() == f"{int(train.observed[i])} → {int(found.predicted[i])}"
        assert ax.texts[0].get_text() == f"#{int(found.problem.origin[i])}"
        pixels = torch.as_tensor(ax.images[0].get_array().filled())
        assert pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).equal(train.x[i])


def test_without_known_flips_the_ranking_is_written_and_called_unproven(tmp_path, capsys):
    words = [
        "audit",
        "--dataset",
        "digits",
        "--noise",
        "none",
        "--k",
        "4",
        "--b",
        "8",
        "--passes",
        "1",
        "--eval-every",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    assert imread(tmp_path / "audit.png").shape[1] == 750  # one panel: none that would be empty
    assert {row["flipped"] for row in csv.DictReader((tmp_path / "samples.csv").open())} == {""}
    assert "so the ranking cannot be checked" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("change", [{"policy": "mean"}, {"scope": "layer"}, {"start": "best"}])
def test_what_has_no_distances_to_a_running_sum_is_refused(change):
    with pytest.raises(
        ConfigError, match="policy must be 'gaf' with scope 'all' and start 'first' for an audit"
    ):
        audit_labels(dataclasses.replace(SMALL, **change), None, lambda *at: None)


def test_one_micro_gradient_is_refused():
    with pytest.raises(ConfigError, match="k must be at least 2 for an audit; got 1"):
        audit_labels(dataclasses.replace(SMALL, k=1), None, lambda *at: None)


# --- the page: `python tests/lab/experiments/test_audit.py` prints its table anew


def signed(differences):
    """The mean over seeds, with its paired bootstrap interval."""
    low, high = bootstrap(differences)
    interval = f" ({low:+.3f} to {high:+.3f})" if len(differences) > 1 else ""
    return f"{differences.mean():+.3f}{interval}"


def table() -> str:
    lines = [
        json.loads(line) for line in (ROOT / "results" / "audit.jsonl").read_text().splitlines()
    ]
    lines = [line for line in lines if line["kind"] == "audit"]
    last = ["label quality - loss of averaging", "marked", "of these wrong", "of the wrong marked"]
    rows = ["| data, label noise | b | n | " + " | ".join([*SCORES.values(), *last]) + " |"]
    rows.append("|---" * (3 + len(SCORES) + len(last)) + "|")
    settings = ("dataset", "noise", "noise_rate", "b")
    for setting in dict.fromkeys(tuple(line[name] for name in settings) for line in lines):
        group = [line for line in lines if tuple(line[name] for name in settings) == setting]
        dataset, noise, rate, b = setting
        cells = [mean_and_deviation([line["auroc"][name] for line in group]) for name in SCORES]
        cells += [signed(-usual_lead(group))]
        cells += [f"{statistics.fmean(line['issues']['count'] for line in group):.0f}"]
        cells += [
            f"{100 * statistics.fmean(line['issues'][name] for line in group):.0f}%"
            for name in ("precision", "recall")
        ]
        rows.append(
            f"| {dataset}, {100 * rate:.0f}% {noise} | {b} | {len(group)} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(rows)


def test_the_pages_table_is_the_records():
    assert table() in (ROOT / "docs" / "audit.md").read_text()


if __name__ == "__main__":
    print(table())
