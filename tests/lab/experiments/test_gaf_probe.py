"""gaf probe: its recommendation holds on other micro-gradients; the training stays as it was."""

import io
import json
import statistics

import pytest
import torch
from rich.console import Console

import gaf
from gaf.measure.result import Probe
from gaf_lab.commands import main as cli
from gaf_lab.experiments import probe, probe_point
from gaf_lab.experiments.probe_report import recommendation, table, verdicts
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.loop import Training

SMALL = ("--dataset", "digits", "--k", 4, "--b", 16, "--rows", 64)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `gaf probe WORDS` in this process; returns exit code, output and errors."""
    monkeypatch.setattr(cli, "Console", lambda **options: Console(**{"width": 80, **options}))

    def call(*words):
        code = cli.main(["probe", *map(str, words)])
        seen = capsys.readouterr()
        return code, seen.out, " ".join(seen.err.split())

    return call


def lines_of(folder):
    conditions, *lines = map(json.loads, (folder / "probe.jsonl").read_text().splitlines())
    assert conditions["kind"] == "conditions"
    return conditions, lines


@pytest.mark.parametrize("b", [10, 100])
def test_on_mnist5k_what_the_tau_accepts_of_unseen_ones_is_within_ten_points_of_the_prediction(
    run, tmp_path, monkeypatch, b
):
    monkeypatch.setattr(probe_point, "CURVE_TAUS", [0.5, 0.7, 0.9])  # the curve is for the figure
    code, out, _ = run("--dataset", "mnist5k", "--b", b, "--after", 0, 60, "--out", tmp_path)
    assert code == 0
    assert out.count("the prediction holds") == 2
    _, lines = lines_of(tmp_path)
    at_b = [line for line in lines if line["m"] == 1]
    assert [line["after"] for line in at_b] == [0, 60]
    assert all(abs(line["predicted"] - line["measured"]) <= 0.1 for line in at_b)
    assert all(0.02 < line["measured"] < 0.7 for line in at_b)  # it filters, and not everything


def test_lines_hold_what_table_and_figure_show(run, tmp_path):
    code, out, _ = run(*SMALL, "--after", 0, 10, "--out", tmp_path)
    assert code == 0
    assert "…" not in out  # 80 columns are enough
    assert out.startswith("digits, 40% symmetric label noise; mlp; GAF, k = 4, b = 16\n")
    conditions, lines = lines_of(tmp_path)
    assert conditions["command"].startswith("gaf probe --dataset digits")
    assert [(line["after"], line["m"], line["b"], line["rows"]) for line in lines] == [
        (after, m, 16 * m, 64 // m) for after in (0, 10) for m in (1, 2, 4)
    ]
    for line in lines:
        assert sum(line["bins"]) == line["rows"] * (line["rows"] - 1) / 2
        assert line["distance_expected"] == pytest.approx(
            line["noise_scale"] / (line["noise_scale"] + line["b"]), rel=1e-4
        )
        assert f"{line['tau']:.3f}" in out
    assert [part["name"] for part in lines[0]["layers"]] == ["1", "3", "5"]
    assert (tmp_path / "probe.png").stat().st_size > 10_000


def test_a_probe_in_the_middle_leaves_the_training_as_it_was():
    # BatchNorm, and a loss that moves its targets
    config = TrainConfig(dataset="digits", model="convnet", k=4, b=8, loss="elr")
    looked_into, alone = Training(config, None), Training(config, None)
    for training in (looked_into, alone):
        for _ in range(3):
            training.macro_batch()
        if training is looked_into:
            probe.probe_now(training, rows=16, slices=2)
        for _ in range(3):
            training.macro_batch()
    for ours, theirs in zip(
        looked_into.model.state_dict().values(), alone.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(looked_into.objective.early.targets, alone.objective.early.targets)


def test_slices_change_the_memory_and_not_the_outcome():
    training = Training(TrainConfig(dataset="digits", k=4, b=8), None)
    whole, cut = probe.probe_now(training, 16, 1), probe.probe_now(training, 16, 3)
    assert cut.gram.allclose(whole.gram, rtol=1e-5)
    assert list(cut.layers) == list(whole.layers)


def line(**changes):
    found = {
        "after": 0,
        "m": 1,
        "b": 10,
        "k": 8,
        "rows": 128,
        "absent": 0,
        "distance_mean": 0.9,
        "distance_expected": 0.9,
        "tau": 0.8,
        "noise_scale": None,
        "noise_low": 4157.0,
        "noise_high": None,
        "dimension": None,
        "predicted": 0.1,
        "measured": 0.1,
        "measured_steps": 0.5,
        "reason": "Because.",
        "tau_interval": [0.77, 0.83],
        "measured_interval": [0.05, 0.15],
    }
    return found | changes


def test_a_prediction_that_fails_and_rows_that_were_absent_are_told():
    (holds,) = verdicts([line()])
    assert "0.0 points away; the prediction holds." in holds
    (fails,) = verdicts([line(measured=0.31, absent=3)])
    assert "21.0 points away; the prediction does not hold" in fails
    assert "3 micro-gradients were zero, NaN or infinite, and left out." in fails


def test_what_is_infinite_has_a_sign():
    screen = io.StringIO()
    Console(file=screen, width=80).print(table([line()]))
    assert "∞ (4,157-∞)" in screen.getvalue()


def test_it_ends_with_one_recommendation_in_one_line(run, tmp_path):
    _, out, _ = run("--dataset", "digits", "--k", 4, "--b", 16, "--after", 0, 10, "--out", tmp_path)
    _, lines = lines_of(tmp_path)
    last = [line for line in lines if line["m"] == 1][-1]
    (low, high), (least, most) = last["tau_interval"], last["measured_interval"]
    assert low < last["tau"] < high < low + 0.2
    assert 0 <= least <= last["measured"] <= most <= 1
    assert out.splitlines()[-1] == (
        f"Recommended: --tau {last['tau']:.3f} (95% interval {low:.3f} to {high:.3f}), "
        "from 128 micro-gradients of b = 16 after 10 steps, one seed. "
        f"Of those compared it should accept {100 * last['predicted']:.0f}%; "
        f"of 64 others it accepted {100 * last['measured']:.0f}% "
        f"({100 * least:.0f} to {100 * most:.0f}%). The accuracy of the training is not measured."
    )
    assert "Recommended" not in " ".join(out.splitlines()[:-1])


def test_where_nothing_can_be_learned_nothing_is_recommended(run, tmp_path):
    """The gradients of white noise with random labels, b = 2, have no direction in common."""
    sizes = ("--limit", 400, "--model", "mlp", "--k", 4, "--b", 2, "--after", 0, "--rows", 64)
    _, out, _ = run("--dataset", "noise", "--noise", "none", *sizes, "--out", tmp_path)
    assert out.splitlines()[-1].startswith(
        "No tau is recommended, from 64 micro-gradients of b = 2 after 0 steps, one seed: "
        "no common direction can be distinguished from noise"
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"noise_scale": None, "noise_high": None},
            "(B may be anything from 4,157 samples up). Raise --b or --rows, or probe --after",
        ),
        (
            {"tau_interval": None},
            "they are too few for an interval at k = 8. Raise --rows to 32 or more.",
        ),
        ({"tau_interval": [0.6, 0.9]}, "it may lie anywhere from 0.60 to 0.90. Raise --rows."),
        (
            {"predicted": 0.4},
            "of 64 others tau = 0.800 accepted 5 to 15%, and 40% were predicted. Raise --rows.",
        ),
    ],
)
def test_what_the_numbers_do_not_bear_out_is_not_recommended(changes, why):
    known = {"noise_scale": 5000.0, "noise_low": 4157.0, "noise_high": 6000.0}
    assert recommendation([line(**known)]).startswith("Recommended: --tau 0.800 (95%")
    said = recommendation([line(**known | changes)])
    assert said.startswith("No tau is recommended, from 128 micro-gradients of b = 10 after 0")
    assert said.endswith(why) or why in said


def test_the_interval_of_a_mean_is_students():
    """Of a mean over equal parts the jackknife is the textbook's: mean +- t s / sqrt(n)."""
    values = [0.1, 0.5, 0.3, 0.9, 0.7, 0.2, 0.4, 0.6]
    less = [(sum(values) - one) / 7 for one in values]
    mean, half = sum(values) / 8, 2.365 * statistics.stdev(values) / 8**0.5
    assert probe.jackknife_interval(mean, less, 2) == pytest.approx([mean - half, mean + half])
    assert probe.jackknife_interval(0.01, [0.0, 0.1] * 4, 1)[0] == 0


def test_an_interval_leaves_out_an_eighth_of_each_half_and_needs_enough_rows():
    rows = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = Probe(4, 4, gaf.gram(rows), {}, 0)
    left = [i for i in range(40) if i % 20 not in (0, 8, 16)]
    assert probe.leave_out(whole, 0).gram.equal(whole.gram[left][:, left])
    assert probe.intervals(Probe(4, 4, gaf.gram(rows[:30]), {}, 0), 0.9, 0.5, 0.05) == (None, None)
    assert probe.intervals(Probe(4, 19, gaf.gram(rows), {}, 0), 0.9, 0.5, 0.05) == (None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--k", 1), "k must be at least 2 for a probe; got 1"),
        (("--sam", 0.1), "sam must be 0 for a probe; got 0.1"),
        (
            ("--rows", 12),
            "rows must be at least 8 and twice k, which is 8; got 12. "
            "Give --rows 128, or lower --k.",
        ),
        (
            ("--k", 100),
            "rows must be at least 8 and twice k, which is 100; got 128. "
            "Give --rows 200, or lower --k.",
        ),
        (
            ("--after", -1),
            "after must name steps of training, at least 0 and fewer than 1,000,000,000; got [-1]",
        ),
        (("--slices", 0), "slices must lie in [1, 1000]; got 0"),
        (("--share", 1.5), "share must lie in (0, 1); got 1.5. The default is 0.5."),
        (("--chance", "nan"), "chance must lie in (0, 1); got nan. The default is 0.05."),
        (("--slices", 10**9), "slices must lie in [1, 1000]; got 1000000000"),
        (
            ("--after", 10**12),
            "after must name steps of training, at least 0 and fewer than 1,000,000,000; "
            "got [10000",
        ),
        (
            ("--rows", 10**9),
            "rows = 1,000,000,000 micro-gradients of 301,066 numbers, in 1 slices: "
            "must fit into memory",
        ),
        (
            ("--rows", 10**6, "--slices", 1000),
            "rows = 1,000,000 micro-gradients of 301,066 numbers, in 1,000 slices: "
            "must fit into memory",
        ),
        (("--toml", "/nowhere.toml"), "config file /nowhere.toml: must exist"),
        (("--out", "/dev/null/probe"), "output folder /dev/null/probe: must be writable"),
    ],
)
def test_a_mistake_becomes_one_message(run, tmp_path, words, message):
    code, _, err = run("--dataset", "digits", "--out", tmp_path, *words)
    assert code == 2
    assert f"gaf probe: {message}" in err


def test_check_names_what_it_wants():
    with pytest.raises(ConfigError, match="after must name steps of training"):
        probe.check_probe(TrainConfig(), (), 128, 1)
