"""The examples, of which most run for fewer epochs; the worker of the Ray Train page.

As a person starts them they are slow.
"""

import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.warm import WARM

EXAMPLES = Path(__file__).parents[2] / "examples"
OUTER = Path(__file__).parents[2] / "docs" / "outer-steps.md"
RAY = Path(__file__).parents[2] / "docs" / "frameworks" / "ray-train.md"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


EPOCHS = {"40": 8, "15": 8}
RANKS = {"plain_pytorch_ddp": 2, "diloco": 4}
NEEDS = {
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "huggingface_trainer": "transformers",
}
NAMES = ("plain_pytorch", "plain_pytorch_ddp", *NEEDS)


def start(name):
    """What an example prints, as a person starts it."""
    ranks = RANKS.get(name)
    launcher = [*TORCHRUN, str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork(program, folder):
    """What a program prints, without the seconds of imports of each process."""
    ranks = RANKS.get(program.stem, 1)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    started = [
        WARM.start_program(
            program,
            out=folder / f"out-{rank}",
            **(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
        )
        for rank in range(ranks)
    ]
    said = [each.finish() for each in started]
    assert [each.returncode for each in started] == [0] * ranks, said
    return "".join(said)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def shorten(name, folder):
    """The example for fewer epochs."""
    text = (EXAMPLES / f"{name}.py").read_text()
    short = re.sub("(?m)^(EPOCHS.* = )(40|15),", lambda m: f"{m[1]}{EPOCHS[m[2]]},", text)
    assert short != text
    program = folder / f"{name}.py"
    program.write_text(short)
    return program


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_accuracy_and_acceptance(name, tmp_path):
    pytest.importorskip(NEEDS.get(name, "torch"))
    check_accuracies(name, fork(shorten(name, tmp_path), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_accuracy_and_acceptance_as_a_person_starts_it(name):
    pytest.importorskip(NEEDS.get(name, "torch"))
    check_accuracies(name, start(name))


def check_accuracies(name, printed):
    found = re.findall(r"^(\w+): accuracy (0\.\d+) (\{.*\})$", printed, re.MULTILINE)
    assert [policy for policy, _, _ in found] == ["averaging" if name in NEEDS else "Mean", "GAF"]
    # of ten digits, 40% of the labels wrong
    assert all(float(accuracy) > 0.6 for _, accuracy, _ in found)
    metrics = ast.literal_eval(found[-1][2])
    assert 0 < metrics["gaf/acceptance"] < 1
    assert 0 < metrics["gaf/stepped"] < 1
    assert metrics["gaf/tau"] == 0.8


def test_one_training_finds_more_wrong_labels_than_cleanlabs_five(tmp_path):
    """On class-dependent noise; cleanlab is no dependency, so this mostly only compiles."""
    text = (EXAMPLES / "cleanlab_compare.py").read_text()
    compile(text, "cleanlab_compare.py", "exec")
    pytest.importorskip("cleanlab", reason="pip install cleanlab: it is no dependency")
    program = tmp_path / "cleanlab_compare.py"
    program.write_text(text.replace("in CASES for s in range(5)", "in CASES[:1] for s in (0,)"))
    found = [json.loads(line) for line in fork(program, tmp_path).splitlines()]
    assert [(line["way"], line["passes"]) for line in found] == [
        ("agreement", 12),
        ("cleanlab", 6),
        ("cleanlab", 12),
    ]
    ours, *others = (line["auroc"] for line in found)
    assert ours > 0.97 > 0.9 > max(others) > 0.5


def test_an_outer_step_withstands_a_bad_process(tmp_path):
    check_outer_steps(fork(EXAMPLES / "diloco.py", tmp_path))


@pytest.mark.slow
def test_an_outer_step_withstands_a_bad_process_as_a_person_starts_it():
    check_outer_steps(start("diloco"))


def check_outer_steps(printed):
    found = re.findall(r"^(\w+): accuracy (0\.\d+), accepted (\[.*\])$", printed, re.MULTILINE)
    accuracy = {policy: float(value) for policy, value, _ in found}
    assert accuracy.keys() == {"Mean", "Guard", "Median", "GAF"}
    for policy, value, rows in re.findall(
        r"^\| `gaf\.(\w+)\(.*\)` \| (0\.\d+) \| (.*) \|$", OUTER.read_text(), re.MULTILINE
    ):
        assert (policy, f"[{rows}]") in [(name, accepted) for name, _, accepted in found]
        assert abs(accuracy[policy] - float(value)) < 0.02  # the last digits of a sum differ
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
