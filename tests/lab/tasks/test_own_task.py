"""A task of the user's own, which is no part of the project: regression with a small network."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from gaf_lab.commands.main import main
from gaf_lab.records import checkpoint
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.loop import Training
from gaf_lab.training.resume import go_on
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

SOURCE = Path(__file__).parents[2] / "helpers" / "regression.py"


@pytest.fixture
def file(tmp_path):
    return shutil.copy(SOURCE, tmp_path / "plane.py")


def own(file, **changes):
    usual = {
        "task": f"{file}:regression",
        "noise": "none",
        "k": 4,
        "b": 10,
        "passes": 6.0,
        "lr": 0.02,
        "device": "cpu",
    }
    return TrainConfig(**{**usual, **changes})


def test_it_trains_on_the_loss_it_gives_and_is_judged_by_its_mean(file, tmp_path):
    config = own(file)
    run = train(config, tmp_path / "run", Silent())
    assert run.header["config"]["task"] == f"{file}:regression"
    assert run.header["config_hash"] == config.hash
    assert (run.score.key, run.score.higher) == ("loss", False)
    assert run.evals[-1]["test_loss"] < 0.5 < run.evals[0]["train_loss"]
    assert run.selected["heldout_loss"] == min(line["heldout_loss"] for line in run.evals)
    training = Training(config, None)
    training.load_state_dict(checkpoint.load(tmp_path / "run", config))
    test = training.problem.test
    with torch.no_grad():
        wrong = (training.model.eval()(test.x) - test.observed).double()
    assert run.evals[-1]["test_loss"] == pytest.approx(float((wrong**2).mean()), rel=1e-6)


def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(file, tmp_path):
    config = own(file)
    whole = train(config, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Stop(after=17))
    parts = train(config, tmp_path / "parts", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    assert [line["test_loss"] for line in whole.evals] == [
        line["test_loss"] for line in parts.evals
    ]


def test_another_source_or_other_data_are_not_resumed(file, tmp_path):
    config = own(file)
    train(config, tmp_path / "run", Silent(), steps=11)
    text = Path(file).read_text()
    Path(file).write_text(text.replace("0.1 *", "0.2 *"))
    with pytest.raises(ConfigError, match="its source must be that of the config.* has changed"):
        train(config, tmp_path / "run", Silent(), resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="same config; task_source: .* there"):
        train(own(file), tmp_path / "run", Silent(), resume=True)
    Path(file).write_text(text)
    training = Training(config, None)
    training.problem.problem.train[1][3] += 1
    with pytest.raises(checkpoint.CheckpointError, match="training data that it began with"):
        go_on(training, checkpoint.load(tmp_path / "run", config))


def test_the_hash_is_that_of_the_source_wherever_it_lies(file, tmp_path):
    (tmp_path / "there").mkdir()
    there = shutil.copy(file, tmp_path / "there" / "plane.py")
    assert own(there).hash == own(file).hash != dataclasses.replace(own(file), tau=0.7).hash
    module = TrainConfig(task="helpers.regression:regression", noise="none")
    assert module.task == "helpers.regression:regression"
    assert module.task_source == own(file).task_source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "regression"}, "task must name a module or file, a colon, and a function"),
        ({"task": "there/is/none.py:f"}, "its file must exist; .*none.py does not"),
        ({"task": "no_such_module:f"}, "its module must be found; 'no_such_module' is not"),
        ({"task": "helpers.regression:regress"}, "no function|must have a function 'regress'"),
        ({"noise": "symmetric"}, "noise 'symmetric' flips classes; the task's targets are no"),
        ({"noise": "human"}, "noise 'human' needs a data set with human labels"),
        ({"sampler": "stratified-clean"}, "draws by class; the task's targets are no classes"),
        ({"loss": "gce"}, "loss must be 'cross-entropy' for a task with a loss of its own"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0.0 for a task with a loss of its own"),
        ({"b": 1000}, "b must not exceed the training samples; got 1000 of 216"),
        ({"channels_last": True}, "channels_last needs inputs"),
    ],
)
def test_what_cannot_run_is_refused(file, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(own(file, **changes), tmp_path / "run", Silent())


BAD = """
import torch
from gaf_lab import Problem

X, Y = torch.randn(40, 3), torch.randn(40)

def task(config):
    return {}
"""


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ("7", "the function must return a gaf_lab.Problem; got int"),
        (
            "good(loss=lambda o, t: ((o - t) ** 2).mean())",
            r"loss must give one number for each sample, \(4,\); got \(\)",
        ),
        ("good(loss=None)", "must give a loss unless its targets are classes"),
        ("good(train=(X, Y[:9]))", "train must have a target for each input; got 40 and 9 rows"),
        ("good(train=(X[:0], Y[:0]))", "train must have at least one sample; it is empty"),
        ("good(test=(X, Y / 0))", "test: targets must be finite; that of sample 0 is not"),
        ("good(train=[1, 2])", "train must be a tuple of tensors .* or a Dataset .*; got list"),
        (
            "good(train=(X.tolist(), Y))",
            r"train must be a tuple of tensors .*; got \(list, Tensor\)",
        ),
        (
            "good(class_names=['a', 'b'])",
            "class_names must be as many as the classes, 0; got 2. Give",
        ),
        (
            "good(sample_names=['a'] * 39)",
            "sample_names must be as many as the training samples, 40; got 39",
        ),
        ("good(model=3)", "model must be a torch.nn.Module, or a function .*; got int"),
        ("good(clean=Y[:9])", r"clean must be a tensor like the targets of train; got \(9,\)"),
        (
            "good(train=(X, Y.long().abs()), test=(X, Y.long().abs()), loss=None)",
            r"must give a score for each class, \(b, .*; got \(4,\)",
        ),
    ],
)
def test_what_is_no_problem_is_refused(tmp_path, returns, message):
    file = tmp_path / "bad.py"
    model = "torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))"
    good = f"dict(model={model}, loss=lambda o, t: (o - t) ** 2, train=(X, Y), test=(X, Y))"
    file.write_text(
        BAD.replace("return {}", f"return {returns}")
        + f"\ndef good(**changes):\n    return Problem(**{{**{good}, **changes}})\n"
    )
    with pytest.raises(ConfigError, match=f"task bad.py:task: .*{message}|{message}"):
        train(own(file, task=f"{file}:task", b=4), tmp_path / "run", Silent())


def test_an_error_of_the_tasks_own_names_its_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def task(config):\n\n    return int('seven')\n")
    assert main(["train", "--task", "own.py:task", "--out", "run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("invalid literal for int() with base 10: 'seven' (own.py, line 3)")
    assert main(["train", "--task", "own.py:task", "--tau", "0.5", "--resume", "--out", "no"]) == 2
    assert "own.py" not in capsys.readouterr().err
