"""The examples that need no more than PyTorch, scikit-learn and Lightning, as a person starts them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(("name", "launcher"), [("plain_pytorch", []), ("plain_pytorch_ddp", TORCHRUN), ("lightning_module", [])])
def test_an_example_prints_accuracy_and_acceptance(name, launcher):
    if name == "lightning_module":
        pytest.importorskip("lightning")
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+): accuracy (0\.\d+) (\{.*\})$", done.stdout, re.MULTILINE)
    assert [policy for policy, _, _ in found] == ["averaging" if name == "lightning_module" else "Mean", "GAF"]
    assert all(float(accuracy) > 0.6 for _, accuracy, _ in found)  # of ten digits, 40% of the labels wrong
    metrics = ast.literal_eval(found[-1][2])
    assert 0 < metrics["gaf/acceptance"] < 1
    assert 0 < metrics["gaf/stepped"] < 1
    assert metrics["gaf/tau"] == 0.8


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
