"""benchmarks/gpu.py, which is meant for a machine with a GPU, runs on any."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        module,
        "CHECKED",
        {"GAF": {"model": "mlp"}, "AdamW": {"model": "mlp", **module.CHECKED["AdamW"]}},
    )
    monkeypatch.setattr(module, "POLICIES", {"averaging": module.POLICIES["averaging"]})
    monkeypatch.setattr(module, "PICTURES", "digits")
    return module


SIZES = {"model": "mlp", "k": 2, "b": 5, "limit": 60, "rounds": 1, "block": 2}
WORDS = [
    "--device",
    "cpu",
    "--runs",
    "1",
    "2",
    *(word for name, size in SIZES.items() for word in (f"--{name}", str(size))),
    "--out",
]


@pytest.mark.usefixtures("unchecked")
def test_it_checks_measures_and_writes_lines(gpu, tmp_path, capsys):
    assert gpu.main([*WORDS, str(tmp_path / "lines")]) == 0
    assert "Every check passed." in capsys.readouterr().out
    conditions, *lines = [
        json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()
    ]
    assert conditions["versions"]["torch"] == torch.__version__
    assert [line["ok"] for line in lines if line["kind"] == "check"] == [True] * 3
    times = [line for line in lines if line["kind"] == "time"]
    assert [(line["engine"], line["runs"]) for line in times] == [
        ("plain", 1),
        ("device", 1),
        ("device", 2),
    ]
    assert all(len(line["ms"]) == 1 and line["ms"][0] > 0 for line in times)


def test_a_check_that_fails_is_said_and_makes_it_fail(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        gpu,
        "checks",
        lambda *args: [gpu.check("one", lambda: (True, "")), gpu.check("another", lambda: 1 / 0)],
    )
    monkeypatch.setattr(gpu, "times", lambda *args: [])
    assert gpu.main([*WORDS, str(tmp_path / "lines")]) == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError: division by zero" in said
    assert "Failed: another." in said
