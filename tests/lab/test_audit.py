"""The rejection audit: what a score is, that a wrong label which speaks up is found, and the page's table."""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gaf
from gaf_lab import audit
from gaf_lab.audit import Tally, spelled
from gaf_lab.cli import main
from gaf_lab.config import ConfigError, TrainConfig
from gaf_lab.data import load
from gaf_lab.problem import build

ROOT = Path(__file__).parent.parent.parent
SMALL = TrainConfig(dataset="digits", k=4, b=8, passes=3.0, eval_every=1.0, tau=0.9)


def outcome(distances: list[float], tau: float = 0.9) -> gaf.Outcome:
    accepted = [d <= tau for d in distances]
    return gaf.Outcome(
        any(accepted), accepted, distances, [0.0] * len(distances), [1.0] * len(distances), 1.0, tau
    )


def written_out(
    steps: list[tuple[list[torch.Tensor], list[float]]], n: int, of: Callable[[float], float]
) -> list[float]:
    """Each sample's mean excess over the last 100 steps, one appearance at a time; of: what is said of a compared row's distance."""
    excess: list[list[float]] = [[] for _ in range(n)]
    rows = [[of(d) for d in sorted(d for d in distances if d == d)[1:]] for _, distances in steps]
    rows = [[*row, statistics.fmean(row)] for row in rows]  # the start's
    for t, (batches, distances) in enumerate(steps):
        usual = statistics.fmean(v for row in rows[max(t - 99, 0) : t + 1] for v in row)
        for batch, d in zip(batches, distances, strict=True):
            for sample in batch.tolist() if d == d else []:
                excess[sample].append((of(d) if d > 0 else statistics.fmean(rows[t])) - usual)
    return [statistics.fmean(one) if one else 0.0 for one in excess]


def test_a_score_is_the_mean_excess_over_the_last_hundred_steps_of_the_micro_batches_that_held_the_sample():
    draw, tally, steps = torch.Generator().manual_seed(0), Tally(9), []
    for t in range(130):
        distances = (0.6 + 0.7 * torch.rand(4, generator=draw)).tolist()
        distances[0] = 0.0 if t % 3 else math.nan
        distances[1] = distances[1] if t % 3 else 0.0
        # no micro-batch holds sample 8
        steps.append((list(torch.randint(8, (4, 3), generator=draw)), distances))
        tally.add(steps[-1][0], outcome(distances))
    assert tally.score().tolist() == pytest.approx(written_out(steps, 9, lambda d: d))
    assert tally.rejection().tolist() == pytest.approx(
        written_out(steps, 9, lambda d: float(d > 0.9))
    )
    assert tally.appearances[8] == tally.score()[8] == 0


def test_of_two_micro_batches_both_are_as_far_from_each_other():
    tally = Tally(4)
    tally.add([torch.tensor([0]), torch.tensor([1])], outcome([0.0, 0.4]))
    tally.add([torch.tensor([2]), torch.tensor([3])], outcome([0.0, 1.2]))
    # 1.2 less the mean of both steps
    assert tally.score().tolist() == pytest.approx([0, 0, 0.4, 0.4])
    assert tally.rejection().tolist() == pytest.approx([0, 0, 0.5, 0.5])


@pytest.mark.parametrize("limit", [0, 300])
def test_the_list_names_samples_as_the_data_set_does(limit):
    problem = build(dataclasses.replace(SMALL, limit=limit), None, torch.device("cpu"))
    data = load("digits", None)
    torch.testing.assert_close(data.train_x[problem.origin], problem.train.x, rtol=0, atol=0)
    assert data.train_y[problem.origin].equal(problem.train.clean)


def test_a_step_in_which_nothing_was_compared_says_nothing():
    tally = Tally(4)
    tally.add([torch.tensor([0]), torch.tensor([1])], outcome([0.0, math.nan]))
    tally.add([torch.tensor([0]), torch.tensor([1])], outcome([math.nan, math.nan]))
    assert (
        tally.appearances.sum() == tally.score().abs().sum() == tally.rejection().abs().sum() == 0
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
    for value in (tally.score(), tally.rejection()):
        assert int(value.argmax()) == 7


def test_the_losses_are_those_of_the_model_and_the_run_is_that_of_gaf_train(tmp_path):
    from fakes import Silent

    from gaf_lab.train import train

    found = audit.audit(SMALL, None, lambda *at: None)
    run = train(SMALL, tmp_path / "run", Silent())
    assert found.selected == pytest.approx(run.selected["heldout_accuracy"])
    assert found.taken == pytest.approx(run.evals[-1]["steps_taken"] / run.evals[-1]["step"])
    assert all(len(value) == len(found.flipped) for value in found.ways.values())
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
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert {row["flipped"] for row in rows} == {"0", "1"}
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()][1:]
    assert [line["seed"] for line in lines] == [0, 1]
    out = capsys.readouterr().out
    assert out.startswith("digits, 40% symmetric label noise; mlp; GAF, k = 4, b = 8\n")
    assert "Best at finding wrong labels" in out


def test_the_difference_is_paired_by_seed():
    lines = [
        {"auroc": {"score": s, "loss_averaging": u}}
        for s, u in ((0.5, 0.9), (0.6, 1.0), (0.4, 0.8))
    ]
    # the spread between seeds is common to both
    assert audit.gap(lines) == "-0.400 (-0.400 to -0.400)"
    assert audit.gap(lines[:1]) == "-0.400"


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
    assert {row["flipped"] for row in csv.DictReader((tmp_path / "samples.csv").open())} == {""}
    assert "nothing tells how good the ranking is" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("change", [{"policy": "mean"}, {"scope": "layer"}, {"start": "best"}])
def test_what_has_no_distances_to_a_running_sum_is_refused(change):
    with pytest.raises(
        ConfigError, match="policy must be 'gaf' with scope 'all' and start 'first' for an audit"
    ):
        audit.audit(dataclasses.replace(SMALL, **change), None, lambda *at: None)


def test_one_micro_gradient_is_refused():
    with pytest.raises(ConfigError, match="k must be at least 2 for an audit; got 1"):
        audit.audit(dataclasses.replace(SMALL, k=1), None, lambda *at: None)


# --- the page: `python tests/lab/test_audit.py` prints its table anew


def table() -> str:
    lines = [
        json.loads(line) for line in (ROOT / "results" / "audit.jsonl").read_text().splitlines()
    ]
    lines = [line for line in lines if line["kind"] == "audit"]
    rows = [
        "| data, label noise | b | n | "
        + " | ".join([*audit.WAYS.values(), "distance - loss of averaging"])
        + " |"
    ]
    rows.append("|---" * (4 + len(audit.WAYS)) + "|")
    for dataset, rate, b in dict.fromkeys(
        (line["dataset"], line["noise_rate"], line["b"]) for line in lines
    ):
        group = [
            line
            for line in lines
            if (line["dataset"], line["noise_rate"], line["b"]) == (dataset, rate, b)
        ]
        cells = [*(spelled(group, "auroc", way) for way in audit.WAYS), audit.gap(group)]
        rows.append(
            f"| {dataset}, {100 * rate:.0f}% | {b} | {len(group)} | " + " | ".join(cells) + " |"
        )
    return "\n".join(rows)


def test_the_pages_table_is_the_records():
    assert table() in (ROOT / "docs" / "audit.md").read_text()


if __name__ == "__main__":
    print(table())
