"""A task that is no part of the project goes through every command that takes a config."""

import json
import shutil
import time
from pathlib import Path

import pytest

from gaf_lab.commands.main import main
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.find import find_runs
from helpers.runs import assert_same, final_state
from helpers.warm import WARM

SOURCE = Path(__file__).parents[2] / "helpers" / "regression.py"
SMALL = ["--k", "4", "--b", "10", "--lr", "0.02", "--device", "cpu"]
PLAN = """
seeds = [0, 1, 2]
[base]
k = 4
b = 10
passes = 4.0
lr = 0.02
device = "cpu"
[[arms]]
policy = "mean"
[[arms]]
tau = 0.5
[[arms]]
policy = "random-subset"
replay = "GAF"
"""


def test_killed_resumed_swept_probed_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SOURCE, "plane.py")
    task = ["--task", "plane.py:regression"]
    whole_path = ["--task", f"{tmp_path}/plane.py:regression"]  # other processes are elsewhere
    words = ["-m", "gaf_lab", "train", *whole_path, *SMALL, "--passes", "40", "--eval-every", "1"]
    whole = WARM.start_program(*words, "--out", tmp_path / "whole", out=tmp_path / "said")
    assert whole.finish()
    assert whole.returncode == 0, whole.text()
    cut = tmp_path / "cut"
    process = WARM.start_program(*words, "--out", cut, out=tmp_path / "said-cut")
    while process.poll() is None and not (
        (cut / checkpoint.CHECKPOINT_FILE).exists() and "eval" in (cut / records.FILE).read_text()
    ):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert records.read(cut).end is None, "it was killed too late"
    assert main([*words[2:], "--out", "cut", "--resume"]) == 0
    assert_same(final_state(tmp_path / "whole"), final_state(cut))

    Path("plan.toml").write_text(PLAN)
    assert main(["sweep", "plan.toml", *task, "--out", "runs", "--workers", "1"]) == 0
    runs = find_runs([Path("runs")])
    assert [run.end["status"] for run in runs] == ["finished"] * 9
    assert {run.header["config"]["task"] for run in runs} == {f"{tmp_path}/plane.py:regression"}
    index = [json.loads(line) for line in Path("runs/sweep.jsonl").read_text().splitlines()]
    last = {run.folder.name: run.evals[-1]["test_loss"] for run in runs}
    assert {line["name"]: line["test_last"] for line in index} == last
    assert main(["sweep", "plan.toml", *task, "--out", "runs", "--dry-run"]) == 0
    assert "9 of 9 runs are finished" in capsys.readouterr().out

    assert main(["probe", *task, *SMALL, "--rows", "16", "--after", "5", "--out", "probe"]) == 0
    assert main(["report", "runs"]) == 0
    said = capsys.readouterr().out
    assert "plane.py:regression; " in said
    assert "selected, last: test loss ± standard deviation" in said
    gaps = [last[run.folder.name] for run in runs if run.arm == "GAF"]
    assert f"{sum(gaps) / 3:.4g}" in said
    page = Path("runs/report.html").read_text()
    assert "on plane.py:regression" in page
    assert "Loss on the test set" in page
    assert "mnist5k" not in page
    assert main(["audit", *task, "--passes", "2", "--b", "10", "--out", "audit"]) == 0
    assert len(Path("audit/samples.csv").read_text().splitlines()) == 1 + 216


def test_runs_judged_by_different_numbers_are_not_reported_together(tmp_path, capsys):
    shutil.copy(SOURCE, tmp_path / "plane.py")
    short = ["--passes", "1", "--b", "10", "--k", "2", "--device", "cpu"]
    for name, what in {"one": ["--task", f"{tmp_path}/plane.py:regression"], "two": []}.items():
        more = what or ["--dataset", "digits", "--limit", "200"]
        assert main(["train", *more, *short, "--out", str(tmp_path / name)]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert "must be judged by one score; these are by loss and accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["fig6"], ["table1"]])
def test_a_plan_of_the_paper_takes_no_task(words, tmp_path, capsys):
    shutil.copy(SOURCE, tmp_path / "plane.py")
    assert main(["sweep", *words, "--task", f"{tmp_path}/plane.py:regression", "--dry-run"]) == 2
    assert "task goes with a TOML file or a preset" in capsys.readouterr().err


def test_its_steps_are_timed(tmp_path, capsys):
    shutil.copy(SOURCE, tmp_path / "plane.py")
    task = f"{tmp_path}/plane.py:regression"
    out = tmp_path / "times.jsonl"
    words = ["bench", "train", "--task", task, "--b", "8", "--rounds", "2", "--device", "cpu"]
    assert main([*words, "--out", str(out)]) == 0
    assert "plain loop" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["task"] == task
    assert all(line["steps_per_second"] > 0 for line in lines if line["kind"] == "bench-train")
