"""Records, packs and checkpoints of gaf 0.1.0 (tests/data/old) are still read, and still resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gaf_lab.records import environment, packs
from gaf_lab.records import run as records
from gaf_lab.records.checkpoint import load
from gaf_lab.records.find import find_runs
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.reading import from_dict
from gaf_lab.training import models
from gaf_lab.training.run import train
from helpers.fakes import Silent

OLD = Path(__file__).parents[2] / "data" / "old"


def small_mlp(inputs: int, classes: int, width: int = 512) -> nn.Sequential:
    """The network of the old run, so small that its checkpoint can be kept."""
    layers = nn.Linear(inputs, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, classes)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.fixture
def config() -> TrainConfig:
    """The config of the old run, from its records."""
    return from_dict(records.read(OLD / "run").header["config"], TrainConfig(), "old records")


def test_old_records_are_read():
    run = records.read(OLD / "run")
    assert (run.arm, run.seed) == ("GAF + EMA of weights, quantile", 0)
    assert run.end["status"] == "stopped"
    assert run.header["versions"]["gaf"] == "0.1.0"
    assert [line["step"] for line in run.evals] == [7, 14]
    assert run.rows == [0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert run.selected is run.evals[0]
    assert run.evals[-1]["test_loss"] == 2.286428689956665
    assert run.evals[-1]["distance_pairs"] == 0.9631117057068138


def test_old_configs_keep_their_hash(config):
    assert config.hash == records.read(OLD / "run").header["config_hash"] == "623032e7d09a"
    assert config.arm == "GAF + EMA of weights, quantile"


def test_old_packs_are_read():
    gaf, mean = packs.read_pack(OLD / "pack.jsonl")
    assert (gaf.arm, mean.arm) == ("GAF + EMA of weights, quantile", "averaging")
    assert gaf.header["config_hash"] == "623032e7d09a"
    assert mean.header["config"]["policy"] == "mean"
    assert [line["train_loss"] for line in mean.evals] == [2.2837, 1.9994, 1.9152, 1.8561]
    assert [line["steps_taken"] for line in gaf.evals] == [1, 2, 6, 9]
    assert gaf.end["status"] == "finished"
    assert len(find_runs([OLD / "run", OLD / "pack.jsonl"])) == 3


def test_an_old_checkpoint_is_read(config):
    state = load(OLD / "run", config)
    assert state["step"] == 14
    assert state["config_hash"] == config.hash
    assert state["records_size"] < (OLD / "run" / records.FILE).stat().st_size


def measures_of(line: dict[str, Any]) -> dict[str, Any]:
    """The values of an evaluation line that are computed from inner products."""
    names = "distance_mean", "distance_min", "distance_pairs", "noise_scale", "norm_dispersion"
    return {name: line[name] for name in names}


def test_an_old_run_resumes_to_the_end_that_the_old_code_reached(config, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "mlp", small_mlp)
    shutil.copytree(OLD / "run", tmp_path / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = train(config, tmp_path / "run", Silent(), resume=True)
    finally:
        torch.set_num_threads(threads)
    end = json.loads((OLD / "end.json").read_text())
    seen = [
        {key: line[key] for key in old}
        for line, old in zip(run.evals[1:], end["evals"], strict=True)
    ]
    assert run.end["status"] == "finished"
    assert seen[0] == end["evals"][0]  # written by the old code
    cpu = environment.cpu_name(), torch.backends.cpu.get_cpu_capability()
    if [torch.__version__, *cpu] == end["made_on"]:
        for line, old in zip(seen, end["evals"], strict=True):
            assert {**line, **measures_of(old)} == old
            # inner products are added up in another order now
            assert measures_of(line) == pytest.approx(measures_of(old), rel=1e-6)
    else:  # another torch or CPU rounds differently
        for line, old in zip(seen, end["evals"], strict=True):
            assert line["rows"] == old["rows"]
            assert line["test_loss"] == pytest.approx(old["test_loss"], rel=1e-4)
