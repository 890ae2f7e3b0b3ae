"""A folder belongs to one run: any second process is refused, and a kill leaves no lock."""

import json
import os
import signal

import pytest

from gaf_lab.commands import main as cli
from gaf_lab.commands.train import words_to_resume
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.locks import LOCK, FolderBusy, check_free, own_folder
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import wait_until
from helpers.warm import WARM

SMALL = TrainConfig(dataset="digits", k=4, b=16, passes=1.0, eval_every=0.5)
WORDS = ("--dataset", "digits", "--k", "4", "--b", "16")
BUSY = "must be one run's at a time; gaf train --out x (process"


def test_a_folder_is_free_again_when_its_holder_lets_go_and_says_nothing_of_it(tmp_path):
    with own_folder(tmp_path, "gaf train --out x"):
        with pytest.raises(FolderBusy) as refused, own_folder(tmp_path):
            pass
        with pytest.raises(FolderBusy):
            check_free(tmp_path)
    assert f"output folder {tmp_path}: {BUSY} {os.getpid()} on " in str(refused.value)
    assert "Wait for its end or stop it, or give another one with --out." in str(refused.value)
    assert (tmp_path / LOCK).read_text() == ""
    with own_folder(tmp_path):
        pass


def test_looking_whether_a_folder_is_free_makes_none(tmp_path):
    check_free(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_file_system_without_locks_is_used_as_if_one_were_alone(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with own_folder(tmp_path):
        assert "process" in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("train", *WORDS),
        ("train", *WORDS, "--resume"),
        ("audit", *WORDS),
        ("probe", *WORDS),
        ("demo", "--passes", "1"),
        ("paper", "fig6"),
    ],
    ids=lambda words: " ".join(word for word in words if word not in WORDS),
)
def test_every_command_that_runs_refuses_a_folder_in_which_another_is_at_work(
    tmp_path, capsys, words
):
    train(SMALL, tmp_path, Silent(), steps=5)
    before = (tmp_path / records.FILE).read_bytes()
    with own_folder(tmp_path, "gaf train --out x"):
        assert cli.main([*words, "--out", str(tmp_path)]) == 2
    assert BUSY in capsys.readouterr().err
    assert (tmp_path / records.FILE).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        LOCK,
        records.FILE,
        checkpoint.CHECKPOINT_FILE,
    }


def test_while_a_run_goes_on_its_folder_is_its_own(tmp_path):
    seen = []

    class Another(Silent):
        def stepped(self, step, outcome):
            for resume in (False, True):
                with pytest.raises(FolderBusy):
                    train(SMALL, tmp_path, Silent(), resume=resume)
                seen.append(resume)

    run = train(SMALL, tmp_path, Another(), steps=2)
    assert seen == [False, True] * 2
    assert (len(run.evals), run.end["status"]) == (1, "stopped")


@pytest.fixture
def begun(tmp_path_factory):
    """`gaf train WORDS` in a process of its own, which takes Ctrl-C."""
    out = tmp_path_factory.mktemp("said") / "out"
    started = []

    def start(*words):
        started.append(WARM.start_program("-m", "gaf_lab", "train", *words, out=out))
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(path, process):
    wait_until(lambda: process.poll() is not None or path.exists())
    assert process.poll() is None, process.text()


def test_a_killed_run_leaves_no_lock_and_goes_on_from_its_first_checkpoint(tmp_path, begun):
    """Before the first evaluation, a run resumes from a checkpoint before the first step."""
    words = (*WORDS, "--passes", "4000", "--eval-every", "4000", "--out", str(tmp_path))
    process = begun(*words)
    wait_for(tmp_path / checkpoint.CHECKPOINT_FILE, process)
    assert cli.main(["train", *words, "--resume"]) == 2
    process.kill()
    process.wait()
    assert f"process {process.pid}" in (tmp_path / LOCK).read_text()  # nobody wiped it out
    assert cli.main(["train", *words, "--resume", "--steps", "3"]) == 0
    run = records.read(tmp_path)
    assert ([line["step"] for line in run.evals], run.end["status"]) == ([3], "stopped")


def test_what_ctrl_c_proposes_before_the_first_evaluation_goes_on(tmp_path, begun):
    words = (*WORDS, "--passes", "4000", "--eval-every", "4000", "--out", str(tmp_path))
    process = begun(*words)
    wait_for(tmp_path / checkpoint.CHECKPOINT_FILE, process)
    process.send_signal(signal.SIGINT)
    out = process.finish()
    assert process.returncode == 130
    (proposed,) = [
        line.partition("Go on with: gaf ")[2] for line in out.splitlines() if "Go on" in line
    ]
    assert proposed == f"train {' '.join(words)} --resume"
    assert cli.main([*proposed.split(), "--steps", "3"]) == 0
    assert records.read(tmp_path).evals[-1]["step"] == 3


@pytest.mark.parametrize("cut", ["", '{"kind": "run", "na', "whole"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_stopped_between_its_header_and_its_first_checkpoint_begins_anew(
    tmp_path, cut, resume
):
    train(SMALL, tmp_path, Silent(), steps=1)
    (tmp_path / checkpoint.CHECKPOINT_FILE).unlink()
    header = (tmp_path / records.FILE).read_text().splitlines(keepends=True)[0]
    (tmp_path / records.FILE).write_text(header if cut == "whole" else cut)
    run = train(SMALL, tmp_path, Silent(), resume=resume)
    assert run.end["status"] == "finished"
    lines = [json.loads(line) for line in (tmp_path / records.FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines].count("run") == 1


def test_before_anything_was_written_ctrl_c_proposes_the_same_command(tmp_path):
    words = ["--dataset", "digits", "--out", str(tmp_path)]
    assert words_to_resume(words, tmp_path) == words
    train(SMALL, tmp_path, Silent(), steps=1)
    assert words_to_resume([*words, "--resume"], tmp_path) == [*words, "--resume"]


@pytest.mark.parametrize("command", ["audit", "data", "report"])
def test_ctrl_c_ends_every_command_without_a_traceback(monkeypatch, capsys, command):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, (stop, ""))
    assert cli.main([command]) == 130
    assert capsys.readouterr().err.strip() == f"gaf {command}: stopped."
