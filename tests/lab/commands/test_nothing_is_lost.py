"""Commands neither ignore what they are given nor mix an old output with a new one."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gaf_lab.commands import main as cli
from gaf_lab.commands.common import say
from gaf_lab.commands.without_effect import refuse_without_effect
from gaf_lab.experiments.audit_report import closing_words
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.console import COLUMNS, table_line


@pytest.mark.parametrize(
    ("words", "given", "needs"),
    [
        ("--noise-rate 0.3", {"noise": "none", "noise_rate": 0.3}, "--noise symmetric"),
        ("--noise_rate=0.3", {"noise": "none", "noise_rate": 0.3}, "--noise symmetric"),
        ("--tau 0.5", {"policy": "mean", "tau": 0.5}, "--policy gaf"),
        ("--threshold-by 3", {"policy": "gaf", "threshold_by": 3.0}, "another --threshold"),
        ("--replay runs/x", {"policy": "mean", "replay": Path("runs/x")}, "--policy that follows"),
        ("--nesterov", {"optimizer": "adam", "nesterov": True}, "--optimizer sgd or muon"),
        ("--shuffle-weights", {"policy": "mean"}, "--agreement"),
        ("--suspects random", {"policy": "mean"}, "--audit-passes"),
        ("--size 64", {"dataset": "cifar100", "size": 64}, "--dataset imagenet"),
        ("--data x", {"dataset": "mnist5k"}, "another --dataset"),
    ],
)
def test_an_option_without_effect_is_refused(words, given, needs):
    config = TrainConfig(**given)
    with pytest.raises(ConfigError, match=f"would have no effect here; it needs .*{needs}"):
        refuse_without_effect(words.split(), config)
    refuse_without_effect([], config)  # from a preset or a file, or left as it is


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--noise-rate 0.3", {"noise": "symmetric"}),
        ("--noise-rate 0", {"noise": "none", "noise_rate": 0.0}),
        ("--tau 0.5 --threshold signal --threshold-by 0.5", {"threshold": "signal"}),
        ("--replay runs/x", {"policy": "random-skip", "replay": Path("runs/x")}),
        ("--nesterov", {"optimizer": "muon"}),
        ("--shuffle-weights", {"agreement": "prototype"}),
        ("--suspects random", {"policy": "mean", "audit_passes": 2.0}),
        ("--size 64 --data x", {"dataset": "imagenet", "model": "resnet18", "size": 64}),
        ("--size 64 --data x", {"task": "gaf_lab.tasks.arrays:arrays", "size": 64}),
        ("--data x", {"dataset": "cifar10"}),
    ],
)
def test_an_option_with_an_effect_passes(words, given):
    refuse_without_effect(words.split(), TrainConfig(**{"policy": "gaf"} | given))


def test_train_and_audit_refuse_it(capsys, tmp_path):
    for command in ("train", "audit"):
        words = [command, "--noise", "none", "--noise-rate", "0.3", "--out", str(tmp_path / "o")]
        assert cli.main(words) == 2
        assert "noise_rate would have no effect here" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "o").exists()


def test_data_keeps_its_source(capsys, tmp_path):
    source = tmp_path / "t.csv"
    source.write_text("a,b\n" + "1,x\n2,y\n" * 20)
    before = source.read_bytes()
    for out, text in ((source, "must be a file that ends in .npz"), ("x.txt", "ends in .npz")):
        assert cli.main(["data", "--from", f"csv:{source}", "--out", str(out)]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
    made = tmp_path / "t.npz"
    assert cli.main(["data", "--from", f"csv:{source}", "--out", str(made)]) == 0
    capsys.readouterr()
    kept = made.read_bytes()
    assert cli.main(["data", "--from", f"npz:{made}", "--out", str(made)]) == 2
    assert "must be another file than the source" in " ".join(capsys.readouterr().err.split())
    assert source.read_bytes() == before and made.read_bytes() == kept


def test_names_are_no_emoji(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def cancer(config):\n    raise ValueError('no :fire:')\n")
    assert cli.main(["train", "--task", "own.py:cancer", "--passes", "1"]) == 2
    assert "no :fire:" in capsys.readouterr().err
    out = io.StringIO()
    say(Console(file=out, emoji=False), "cancer.py:cancer")
    assert out.getvalue() == "cancer.py:cancer\n"


def test_cells_that_are_too_wide_stay_apart():
    cells = ["0.89", "3", "309.024", *["1"] * (len(COLUMNS) - 3)]
    assert table_line(cells).split() == cells
    wide = ["123456789012"] * len(COLUMNS)
    assert table_line(wide).split() == wide


def test_an_audit_of_one_step_is_refused_before_it_trains(capsys, tmp_path):
    words = [
        "audit",
        "--dataset",
        "digits",
        "--model",
        "mlp-small",
        "--passes",
        "0.05",
        "--b",
        "100",
        "--out",
    ]
    assert cli.main([*words, str(tmp_path / "o")]) == 2
    assert "at least two steps" in " ".join(capsys.readouterr().err.split())


def test_words_on_several_seeds_say_that_they_are_means():
    issues = {"count": 5, "precision": 0.5, "recall": 0.5}
    line = {"samples": 100, "issues": issues, "auroc": {"quality": 0.9, "loss": 0.8}}
    line["first100"] = {"quality": 0.5, "loss": 0.4}
    assert "means" not in closing_words([line])
    assert closing_words([line, line]).endswith(
        "These are means of 2 seeds; samples.csv is of the first one alone."
    )


def test_pictures_of_an_earlier_audit_do_not_stay(capsys, tmp_path):
    out = tmp_path / "audit"
    words = [
        "audit",
        "--passes",
        "1",
        "--limit",
        "200",
        "--model",
        "mlp-small",
        "--b",
        "50",
        "--heldout",
        "0.1",
    ]
    assert cli.main([*words, "--dataset", "digits", "--out", str(out)]) == 0
    assert (out / "suspects.png").is_file()
    rows = torch.randn(200, 4)
    table = "\n".join(f"{','.join(map(str, r.tolist()))},{int(r[0] > 0)}" for r in rows)
    (tmp_path / "t.csv").write_text(f"a,b,c,d,y\n{table}\n")
    made = tmp_path / "t.npz"
    assert cli.main(["data", "--from", f"csv:{tmp_path / 't.csv'}", "--out", str(made)]) == 0
    task = ["--task", "gaf_lab.tasks.arrays:arrays", "--data", str(made)]
    assert cli.main([*words, *task, "--out", str(out)]) == 0, capsys.readouterr().err
    assert (out / "samples.csv").is_file() and not (out / "suspects.png").exists()


@pytest.mark.parametrize("option", ["--scale smoke", "--reading=code"])
def test_sweep_refuses_the_papers_options_with_other_plans(capsys, tmp_path, option):
    plan = tmp_path / "plan.toml"
    plan.write_text('arms = [{ policy = "mean" }]\n')
    name = option[2:].split()[0].split("=")[0]
    for other in (str(plan), "demo-gaf"):
        assert cli.main(["sweep", other, *option.split(), "--dry-run"]) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert f"{name} goes with a figure or table of the paper alone" in shown
    assert cli.main(["sweep", "fig6", *option.split(), "--dry-run"]) == 0


def test_empty_records_are_called_empty(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.jsonl").touch()
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "must be a header of kind 'run'; the file is empty." in shown
