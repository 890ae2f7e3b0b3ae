"""Every command says how far it is where there is no terminal, in plain lines."""

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from gaf_lab import progress as telling
from gaf_lab.commands import main as cli
from gaf_lab.data import download
from gaf_lab.settings.plan import folder_name
from gaf_lab.settings.presets import DEMO
from gaf_lab.sweeps.board import Board
from gaf_lab.sweeps.jobs import JobProgress, jobs
from gaf_lab.training import console as console_module
from gaf_lab.training.console import ConsoleListener, Progress
from helpers.reports import nine

PATIENCE = 600.0  # seconds for a thread to get its turn
DIGITS = ("--dataset", "digits", "--b", "10", "--passes", "1")


def pipe() -> Console:
    return Console(file=io.StringIO(), width=80)


def said(console: Console) -> list[str]:
    """The lines, of which none may move a cursor or have a colour."""
    text = console.file.getvalue()
    assert not {"\r", "\x1b"} & set(text)
    return text.splitlines()


def until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    assert holds()


@pytest.fixture
def standing_clock(monkeypatch):
    """No second passes, however busy the machine is."""
    now = time.monotonic()
    for module in (telling, console_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))


# --- the parts ---


def test_a_pulse_says_how_far_it_is_again_and_again_until_it_stops(monkeypatch):
    monkeypatch.setattr(telling, "EVERY", 0.01)
    console, steps = pipe(), iter(range(1000))
    pulse = telling.Pulse(console, lambda: f"step {next(steps)}")
    pulse.start()
    until(lambda: len(said(console)) >= 3)
    pulse.stop()
    lines = said(console)
    for i, line in enumerate(lines[:2]):  # on a busy machine seconds pass
        assert re.fullmatch(rf"step {i}, 0:\d\d:\d\d so far", line)
    assert not pulse.thread.is_alive()


@pytest.mark.parametrize(
    "console", [Console(file=io.StringIO(), force_terminal=True), Console(quiet=True)]
)
def test_a_pulse_is_silent_on_a_terminal_and_where_nobody_listens(console):
    pulse = telling.Pulse(console, lambda: "step")
    pulse.start()
    assert not pulse.thread.is_alive()
    pulse.stop()


def test_what_is_said_otherwise_takes_the_place_of_a_line(monkeypatch):
    console = pipe()
    pulse = telling.Pulse(console, lambda: "step")
    pulse.said -= 2 * telling.EVERY
    pulse.rest()
    pulse.start()
    pulse.stop()
    assert said(console) == []


@pytest.mark.usefixtures("standing_clock")
def test_progress_has_a_line_for_each_new_part_and_an_estimate():
    console = pipe()
    with Progress(console, "round") as progress:
        progress("k = 2", 0, 30)
        progress("k = 2", 1, 30)
        progress("k = 4", 5, 30)
        progress.begun -= 20
        progress("k = 4", 10, 30)
        assert progress._text() == "k = 4: round 10 of 30, eta 0:01:20"
    assert said(console) == [
        "k = 2: round 0 of 30, 0:00:00 so far",
        "k = 4: round 5 of 30, 0:00:00 so far",
    ]


def test_progress_takes_names_as_text_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console) as progress:
        progress("[red]x[/red]", 1, 2)
    assert "[red]" in console.file.getvalue()


def test_a_sweeps_board_says_how_many_runs_and_samples_are_done(tmp_path):
    configs = [DEMO, *(type(DEMO)(**{**vars(DEMO), "seed": seed}) for seed in (1, 2, 3))]
    plan = jobs(configs, tmp_path, data_folder=None, keep_checkpoints=True, command=None)
    board = Board(pipe(), plan, {})
    board.show_progress(folder_name(configs[0]), JobProgress(1.0, ""))
    board.drawn = 0.0
    board.show_progress(folder_name(configs[1]), JobProgress(0.5, ""))
    board.draw()
    assert board._how_far().startswith("0 of 4 runs finished, 38% of all samples")


@pytest.mark.usefixtures("standing_clock")
def test_a_download_says_how_many_bytes_have_come():
    console = pipe()
    with download.Download(console) as bar:
        bar.update(bar.add_task("cifar-100", total=200_000_000, completed=0), completed=50_000_000)
        bar.pulse.say()
    assert said(console) == ["downloading cifar-100: 50.0 of 200.0 MB, 0:00:00 so far"]


# --- the commands ---


@pytest.mark.parametrize(
    ("words", "progress"),
    [
        (("audit", *DIGITS), ["seed 0: step"]),
        (
            ("probe", *DIGITS, "--after", "0", "3", "--rows", "32"),
            [
                "probing at step 0: step 1 of 32",
                "training: step 1 of 3",
                "probing at step 3: step 1 of 32",
            ],
        ),
        (("data", "digits"), ["reading digits: part 1 of 2", "counting digits: part 2 of 2"]),
        (
            ("bench", "accumulate", "--model", "mlp", "--b", "2", "--k", "2", "--rounds", "2"),
            ["k = 2, gaf.Mean(): round 0 of 2", "k = 2, gaf.GAF(): round 0 of 2"],
        ),
    ],
    ids=["audit", "probe", "data", "bench"],
)
def test_a_command_says_in_a_pipe_how_far_it_is(words, progress, tmp_path):
    console = pipe()
    out = ("--out", str(tmp_path / "out" / "x")) if words[0] in ("audit", "probe") else ()
    assert cli.run_command([*words, *out], console) == 0
    lines = said(console)
    places = [next(i for i, line in enumerate(lines) if line.startswith(p)) for p in progress]
    assert places == sorted(places)
    assert all(line.endswith(" so far") for line in (lines[i] for i in places))


def test_training_says_how_far_it_is_between_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(telling, "EVERY", 0.001)
    console = pipe()
    words = ["train", *DIGITS, "--eval-every", "1", "--out", str(tmp_path / "run")]
    assert cli.run_command(words, console) == 0
    assert [line for line in said(console) if line.startswith("training: step ")]


def test_the_listener_of_a_run_can_begin_twice(tmp_path):
    listener = ConsoleListener(pipe())
    listener.pulse.start()
    listener.pulse.start()
    listener.close()


def test_a_report_says_which_figure_it_draws(tmp_path):
    nine(tmp_path / "runs")
    console = pipe()
    assert cli.run_command(["report", str(tmp_path / "runs")], console) == 0
    lines = said(console)
    assert [line for line in lines if line.startswith("drawing: figure 1 of 5")]
    assert [line for line in lines if line.startswith("writing the page: figure 1 of 3")]
