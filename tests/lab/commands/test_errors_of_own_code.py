"""A fault in a task of the user's own: what the command line shows of it."""

import pytest

from gaf_lab.commands.main import main

TASKS = """\
import functools
import torch
from torch import nn
from gaf_lab import Metric, Problem

def problem(**changes):
    x = torch.randn(200, 4)
    part = x, (x[:, 0] > 0).long()
    return Problem(**{"model": nn.Linear(4, 2), "train": part, "test": part} | changes)

def three(config, size, depth):
    return problem()

def optional(config, size=4):
    return problem()

def raises(config):
    raise KeyError("no such file")

def reshapes(config):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none").view(3, -1)
    return problem(loss=loss)

def one_argument(config):
    return problem(loss=lambda output: output[:, 0])

def metric_of_one(config):
    return problem(metric=Metric("error", lambda output: output[:, 0]))

def caused(config):
    try:
        raises(config)
    except KeyError as error:
        raise RuntimeError("cannot read it") from error

def wrapped(config):
    def with_scale(function):
        @functools.wraps(function)
        def call(*pair):
            return function(*pair, 2.0)
        return call
    @with_scale
    def loss(output, target, scale):
        return scale * nn.functional.cross_entropy(output, target, reduction="none")
    return problem(loss=loss)

def frozen(config):
    return problem(model=nn.Linear(4, 2).requires_grad_(False))

def no_graph(config):
    return problem(loss=lambda output, target: torch.ones(len(output)))
"""


def run(tmp_path, task: str) -> int:
    path = tmp_path / "own.py"
    path.write_text(TASKS)
    words = ["--passes", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    return main(["train", "--task", f"{path}:{task}", *words])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("three", "must take one argument, the config, and may take another named data; got "),
        ("three", "three(config, size, depth)"),
        ("one_argument", "the task's loss must take two arguments, (output, target); got "),
        ("metric_of_one", "the task's metric must take two arguments, (output, target); got "),
        ("frozen", "model must have a parameter that requires grad; none of its 2 parameters does"),
        ("no_graph", "loss must be computed from the model's output by operations that autograd"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(tmp_path, capsys, task, message):
    assert run(tmp_path, task) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["optional", "wrapped"])
def test_what_can_be_called_is_allowed(tmp_path, task):
    assert run(tmp_path, task) == 0


def test_the_cause_of_an_exception_is_shown_too(tmp_path, capsys):
    assert run(tmp_path, "caused") == 2
    shown = capsys.readouterr().err
    assert "KeyError: 'no such file'" in shown
    assert "RuntimeError: cannot read it" in shown


def test_data_that_no_parameter_takes_are_refused(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text(TASKS)
    words = ["--task", f"{path}:optional", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    assert "data must be left out for a function without a parameter named data" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("task", "line", "error"),
    [
        ("raises", 'raise KeyError("no such file")', "KeyError: 'no such file'"),
        ("reshapes", ".view(3, -1)", "RuntimeError: shape '[3, -1]' is invalid"),
    ],
)
def test_an_exception_shows_the_users_own_lines_alone(tmp_path, capsys, task, line, error):
    assert run(tmp_path, task) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gaf train: an error in code of your own:\n")
    assert line in shown
    assert error in shown
    assert "gaf_lab" not in shown


def test_a_file_that_is_no_python_shows_its_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import torch\ndef task(:\n")
    assert main(["train", "--task", f"{path}:task", "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "broken.py" in shown
    assert "line 2" in shown
    assert "SyntaxError" in shown


def test_a_fault_of_the_lab_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("gaf_lab.data.run_data.RunData.steps", property(iter))
    with pytest.raises(TypeError, match="not iterable"):
        run(tmp_path, "optional")
