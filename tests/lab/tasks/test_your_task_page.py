"""docs/your-task.md from the CSV to the report: its blocks in order, with less training."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from gaf_lab.commands.main import main
from gaf_lab.records.find import find_runs

PAGE = (Path(__file__).parents[3] / "docs" / "your-task.md").read_text()
SHORTER = {
    "train": ["--passes", "2"],
    "sweep": ["--seeds", "1", "--workers", "1"],
    "probe": ["--rows", "16", "--after", "3"],
    "audit": ["--passes", "2"],
    "report": [],
    "data": [],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's python and toml blocks as the files that its text names."""
    monkeypatch.chdir(tmp_path)
    first, own = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(first, {})
    Path("cancer.py").write_text(own)
    (plan,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)
    Path("cancer.toml").write_text(plan.replace("passes = 30.0", "passes = 2.0"))
    return tmp_path


def test_the_page_goes_from_a_csv_to_a_report(folder, capsys):
    shells = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    commands = [shlex.split(line) for shell in shells for line in shell.splitlines()]
    assert len(commands) == 7
    for tool, *words in commands:
        assert tool == "gaf"
        assert main([*words, *SHORTER[words[0]]]) == 0, words
    said = " ".join(capsys.readouterr().out.split())
    assert "2 (benign: 286, malignant: 170)" in said
    runs = find_runs([folder / "runs" / "cancer"])
    assert sorted(run.arm for run in runs) == ["GAF", "averaging", "random subset"]
    assert all(run.evals[-1]["memorised"] is not None for run in runs)
    for name in ("report.html", "accuracy.png", "memorisation.png"):
        assert (folder / "runs" / "cancer" / name).exists()
    table = list(csv.reader(Path("cancer.csv").read_text().splitlines()))
    listed = list(csv.DictReader(Path("runs/audit/samples.csv").read_text().splitlines()))
    assert len(listed) > 400
    for row in listed:
        assert table[int(row["sample"].removeprefix("line ")) - 1][-1] == row["given_class"]
    (own,) = find_runs([folder / "runs" / "own"])
    assert own.evals[-1]["test_accuracy"] > 0.8
