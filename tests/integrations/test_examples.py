"""The examples, as a person starts them; the worker of the Ray Train page."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

EXAMPLES = Path(__file__).parents[2] / "examples"
RAY = Path(__file__).parents[2] / "docs" / "frameworks" / "ray-train.md"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


NEEDS = {
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "huggingface_trainer": "transformers",
}


def start(name, *launcher):
    """What an example prints."""
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["plain_pytorch", "plain_pytorch_ddp", *NEEDS])
def test_an_example_prints_accuracy_and_acceptance(name):
    pytest.importorskip(NEEDS.get(name, "torch"))
    printed = start(name, *([*TORCHRUN, "2"] if name.endswith("_ddp") else []))
    found = re.findall(r"^(\w+): accuracy (0\.\d+) (\{.*\})$", printed, re.MULTILINE)
    assert [policy for policy, _, _ in found] == ["averaging" if name in NEEDS else "Mean", "GAF"]
    # of ten digits, 40% of the labels wrong
    assert all(float(accuracy) > 0.6 for _, accuracy, _ in found)
    metrics = ast.literal_eval(found[-1][2])
    assert 0 < metrics["gaf/acceptance"] < 1
    assert 0 < metrics["gaf/stepped"] < 1
    assert metrics["gaf/tau"] == 0.8


def test_an_outer_step_withstands_a_bad_process():
    printed = start("diloco", *TORCHRUN, "4")
    found = re.findall(r"^(\w+): accuracy (0\.\d+), accepted (\[.*\])$", printed, re.MULTILINE)
    accuracy = {policy: float(value) for policy, value, _ in found}
    assert accuracy.keys() == {"Mean", "Guard", "Median", "GAF"}
    assert accuracy.pop("Mean") < 0.2  # of ten digits: the weights are NaN
    assert min(accuracy.values()) > 0.85
    accepted = {policy: ast.literal_eval(rows) for policy, _, rows in found}
    assert accepted["Guard"] == accepted["Median"] == [10, 8, 10, 10]
    assert accepted["GAF"][1] == 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 65


def ray_worker() -> tuple[list[float], dict[str, Any], dict[str, float]]:
    (block,) = re.findall(r"```python\n(.*?)```", RAY.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    model, reports = DistributedDataParallel(torch.nn.Linear(20, 2)), []
    handle = names["train"](model, reports.append)
    return (
        torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist(),
        handle.stats(),
        reports[0],
    )


@pytest.mark.distributed
def test_the_worker_of_the_ray_train_page_filters_among_two_ranks(pair):
    (weights, stats, logged), other = pair.run(ray_worker)
    assert (weights, stats, logged) == other
    assert stats["steps"] == 20
    assert logged["gaf/stepped"] == stats["stepped"] / 20
    assert 0 < logged["gaf/acceptance"] < 1
