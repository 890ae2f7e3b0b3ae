"""Sweeps: whatever is killed, at any moment, the runs end as undisturbed ones, each run once."""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from gaf_lab.commands import main as cli
from gaf_lab.data.sets import load_dataset
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.locks import LOCK
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import folder_name, follow, from_file
from gaf_lab.settings.sizes import PICTURES
from gaf_lab.sweeps import processes
from gaf_lab.sweeps.board import Board
from gaf_lab.sweeps.jobs import JobEnd, JobProgress, jobs
from gaf_lab.sweeps.sweep import Dispatcher, sweep
from gaf_lab.sweeps.worker import INDEX, add_to_index, work
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import assert_same, final_state, wait_until
from helpers.warm import WARM

FILE = """
seeds = [0, 1]
[base]
dataset = "mnist5k"
limit = 300
k = 3
b = 8
passes = 4
eval_every = 0.5
lr = 0.02
tau = 0.9
[[arms]]
policy = "random-subset"
replay = "GAF"
[[arms]]
[[arms]]
policy = "mean"
"""
BASE = TrainConfig(
    dataset="mnist5k", limit=300, k=3, b=8, passes=2.0, eval_every=1.0, lr=0.02, tau=0.9
)
MEAN = dataclasses.replace(BASE, policy="mean")
QUIET = Console(quiet=True)
ALONE = {"workers": 1, "data_folder": None, "console": QUIET}
TIMING = ("seconds", "samples_per_second")


def subset(recorded):
    return follow(
        dataclasses.replace(recorded, policy="random-subset", label="", replay=Path("named below")),
        recorded,
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """The folder of a sweep that nothing disturbed, with two workers as in the commands below."""
    out = tmp_path_factory.mktemp("whole")
    assert not sweep(from_file(plan), out, workers=2, data_folder=None, console=QUIET).failed
    return out


@pytest.fixture
def start(tmp_path_factory):
    """Starts `gaf sweep WORDS` in a process group of its own; nothing of it outlives the test."""
    started = []

    def launch(*words):
        out = tmp_path_factory.mktemp("said") / "out"
        started.append(WARM.start_program("-m", "gaf_lab", "sweep", *words, out=out))
        return started[-1]

    yield launch
    for process in started:
        process.kill(group=True)
        process.wait()


class Here:
    """An engine in this process. deaths: how often a job's process dies before it does any work."""

    def __init__(self, deaths=()):
        self.deaths, self.started, self.waiting = Counter(dict(deaths)), [], []

    def room(self):
        return 1 - len(self.waiting)

    def start(self, job):
        self.started.append(job.name)
        self.waiting.append(job)

    def events(self, seconds):
        job = self.waiting.pop()
        self.deaths[job.name] -= 1
        yield (
            job.name,
            JobEnd("died", "it died.") if self.deaths[job.name] >= 0 else work(job, Silent()),
        )

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Sweeps work in this process, which costs them less time than workers of their own."""
    monkeypatch.setattr(processes, "Processes", lambda workers: Here())


def recorded_facts(run):
    """A run's records without time and place."""
    config = run.header["config"] | {"replay": Path(run.header["config"]["replay"] or "").name}
    evals = [{key: value for key, value in line.items() if key not in TIMING} for line in run.evals]
    return (
        run.header["name"],
        run.header["arm"],
        run.header["config_hash"],
        config,
        evals,
        run.end["status"],
    )


def assert_same_runs(a, b):
    names = sorted(path.parent.name for path in a.glob(f"*/{records.FILE}"))
    assert names == sorted(path.parent.name for path in b.glob(f"*/{records.FILE}"))
    for name in names:
        assert recorded_facts(records.read(a / name)) == recorded_facts(records.read(b / name)), (
            name
        )
        assert_same(final_state(a / name), final_state(b / name))
        kinds = [
            json.loads(line)["kind"] for line in (b / name / records.FILE).read_text().splitlines()
        ]
        assert kinds == ["run", *["eval"] * len(records.read(a / name).evals), "end"]


def assert_index_is_whole(out):
    lines = [json.loads(line) for line in (out / INDEX).read_text().splitlines()]
    names = sorted(path.parent.name for path in out.glob(f"*/{records.FILE}"))
    assert sorted(line["name"] for line in lines) == names
    for line in lines:
        run = records.read(out / line["name"])
        key = f"test_{run.score.key}"
        scores = {"test_last": run.evals[-1][key], "test_selected": run.selected[key]}
        what = {
            "name": run.folder.name,
            "arm": run.arm,
            "seed": run.seed,
            "hash": run.header["config_hash"],
        }
        assert line == what | scores | {"seconds": run.end["seconds"]}


def state_of(folders):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.iterdir()
        if path.name != LOCK
    }


def finished_folders(out):
    found = [
        records.read(path.parent)
        for path in out.glob(f"*/{records.FILE}")
        if path.read_bytes().count(b"\n")
    ]
    return [run.folder for run in found if run.end is not None and run.end["status"] == "finished"]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- undisturbed


def test_a_sweep_leaves_the_runs_that_training_one_by_one_leaves(plan, whole, tmp_path):
    configs = from_file(plan)
    paired = [configs[i] for i in (1, 0, 2)]  # the recorded run first
    for config in paired:
        alone = dataclasses.replace(config, replay=config.replay and tmp_path / config.replay)
        run = train(alone, tmp_path / folder_name(config), Silent())
        assert recorded_facts(run) == recorded_facts(records.read(whole / folder_name(config)))
        assert run.header["config_hash"] == config.hash
    assert_index_is_whole(whole)


def test_a_finished_sweep_is_not_run_again_and_its_index_is_made_anew(plan, whole):
    folders = finished_folders(whole)
    before = state_of(folders)
    (whole / INDEX).unlink()
    swept = sweep(from_file(plan), whole, workers=2, data_folder=Path("/nowhere"), console=QUIET)
    assert [run.folder.name for run in swept.runs] == [
        folder_name(config) for config in from_file(plan)
    ]
    assert state_of(folders) == before
    assert len(folders) == 6
    assert_index_is_whole(whole)


def test_equal_configs_are_one_run_in_the_folder_that_a_control_replays(here, tmp_path):
    named = dataclasses.replace(BASE, label="other name")
    swept = sweep([BASE, named, subset(named), MEAN, MEAN], tmp_path, **ALONE)
    assert [run.arm for run in swept.runs] == ["other name", "random subset", "averaging"]
    assert swept.runs[0].rows == swept.runs[1].rows
    assert 0 < swept.runs[0].rows.count(0) < len(swept.runs[0].rows)
    again = sweep([subset(named)], tmp_path, **ALONE)  # the recorded run is of an earlier plan
    assert [run.folder for run in again.runs] == [swept.runs[1].folder]


# --- disturbed


def test_killed_at_any_moment_and_started_again_a_sweep_ends_as_an_undisturbed_one(
    plan, whole, start, tmp_path
):
    moments, cut = random.Random(1), []
    for how in ("ctrl-c", "kill", "kill the sweep alone", "kill"):
        before = state_of(finished_folders(tmp_path))
        names = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{records.FILE}")}
        process = start(plan, "--workers", 2, "--out", tmp_path)
        wait_until(
            lambda old=names: (
                {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{records.FILE}")}
                != old
            )
        )
        time.sleep(moments.uniform(0, 0.5))
        if process.poll() is None:
            cut.append(how)
        if how == "kill the sweep alone":  # its workers find out by themselves
            process.kill()
        else:
            process.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGKILL, group=True)
        out = process.finish()
        if how == "ctrl-c":
            assert process.returncode == 130, out
            assert (
                f"Stopped. Go on with the same command: gaf sweep {plan} --workers 2 "
                f"--out {tmp_path}" in out
            )
            assert "Traceback" not in out
        assert state_of({path.parent for path in before}) == before
    assert len(cut) >= 3
    out = start(plan, "--workers", 2, "--out", tmp_path).finish()
    assert "6 of 6 runs are finished, in" in out
    assert_same_runs(whole, tmp_path)
    assert_index_is_whole(tmp_path)


@pytest.mark.slow
def test_two_sweeps_at_the_same_time_share_the_runs(plan, whole, start, tmp_path):
    both = [start(plan, "--workers", 2, "--out", tmp_path) for _ in range(2)]
    for process in both:
        out = process.finish()
        assert process.returncode == 0, out
        assert "6 of 6 runs are finished, in" in out
    assert_same_runs(whole, tmp_path)
    assert_index_is_whole(tmp_path)


def test_while_a_run_goes_on_nobody_else_can_begin_it(tmp_path):
    job = one(jobs([BASE], tmp_path, data_folder=None, keep_checkpoints=True, command=None))
    seen = []

    class Another(Silent):
        def stepped(self, step, outcome):
            if step in (1, 20):
                seen.append(work(job, Silent()))

    assert work(job, Another()) == JobEnd("finished")
    assert seen == [JobEnd("busy")] * 2
    assert work(job, Another()) == JobEnd("finished")
    assert len(seen) == 2


@pytest.mark.parametrize(("threads", "workers", "each"), [(4, 2, 2), (1, 1, 1), (1, 2, 1)])
def test_the_workers_share_the_threads_that_torch_was_given(threads, workers, each, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)  # as OMP_NUM_THREADS makes it
    assert processes.Processes(workers).threads == each


def one(plan):
    (job,) = plan.values()
    return job


def test_a_worker_that_is_killed_is_replaced_and_its_run_goes_on_from_the_checkpoint(tmp_path):
    config = dataclasses.replace(BASE, passes=10.0, eval_every=1.0)
    folder, console = tmp_path / "cut" / folder_name(config), Console(file=io.StringIO())
    kept, others = [], set(multiprocessing.active_children())

    def kill():
        wait_until((folder / checkpoint.CHECKPOINT_FILE).exists)
        (worker,) = set(multiprocessing.active_children()) - others
        worker.kill()
        # join() here would take the exit code that the sweep waits for
        wait_until(lambda: not is_running(worker.pid))
        kept.append(records.read(folder))

    killer = threading.Thread(target=kill)
    killer.start()
    swept = sweep(
        [config], tmp_path / "cut", workers=os.cpu_count(), data_folder=None, console=console
    )
    killer.join()
    assert (
        f"{folder.name}: its process died with exit code -9. It resumes from its last checkpoint."
        in console.file.getvalue()
    )
    assert kept[0].end is None
    assert swept.runs[0].header["started"] == kept[0].header["started"]  # not begun anew
    assert recorded_facts(swept.runs[0]) == recorded_facts(
        train(config, tmp_path / "whole" / folder.name, Silent())
    )
    assert set(multiprocessing.active_children()) <= others


def test_a_run_is_tried_three_times_then_it_and_what_waits_for_it_have_failed_and_the_others_go_on(
    tmp_path,
):
    other = dataclasses.replace(BASE, seed=1)
    plan = jobs(
        [BASE, subset(BASE), other, subset(other)],
        tmp_path,
        data_folder=None,
        keep_checkpoints=True,
        command=None,
    )
    names = list(plan)
    engine = Here({names[0]: 3, names[2]: 2})
    swept = Dispatcher(plan, {}, Board(QUIET, plan, {})).run(engine)
    assert [run.folder.name for run in swept.runs] == names[2:]
    assert swept.failed == {
        names[0]: "it died. It was tried 3 times.",
        names[1]: f"it replays {names[0]}, which failed.",
    }
    assert Counter(engine.started) == {names[0]: 3, names[2]: 3, names[3]: 1}


def test_runs_that_cannot_be_finished_are_told_with_the_reason_and_are_not_retried(here, tmp_path):
    diverging = dataclasses.replace(BASE, lr=1e30, momentum=0.0, min_accepted=1, tau=2.0)
    large = dataclasses.replace(BASE, b=2000)
    console = Console(file=io.StringIO(), width=200)
    swept = sweep(
        [diverging, subset(diverging), large, MEAN],
        tmp_path,
        workers=1,
        data_folder=None,
        console=console,
    )
    assert [run.arm for run in swept.runs] == ["averaging"]
    first, second, third = swept.failed.values()
    assert first.startswith("Diverged: step ")
    assert second == f"it replays {folder_name(diverging)}, which failed."
    assert third.startswith("ConfigError: b must not exceed the training samples; got 2000 of")
    lines = console.file.getvalue().splitlines()
    assert sum(f"{folder_name(diverging)} failed: Diverged" in line for line in lines) == 1
    assert len(lines) == 4
    assert lines[-1].startswith(f"1 of 4: {folder_name(MEAN)}: test ")
    planned = jobs(
        [diverging, MEAN], tmp_path, data_folder=None, keep_checkpoints=True, command=None
    )
    assert [job.state() for job in planned.values()] == ["diverged", "finished"]


def test_a_failed_run_names_the_line_of_the_users_own_file_in_which_it_failed(here, tmp_path):
    (tmp_path / "own.py").write_text("def own(config):\n    return {}['no such key']\n")
    config = TrainConfig(task=f"{tmp_path / 'own.py'}:own", noise="none", policy="mean")
    (why,) = sweep([config], tmp_path / "out", **ALONE).failed.values()
    assert why == "KeyError: 'no such key' (own.py, line 2)"


def test_without_a_checkpoint_a_run_that_was_cut_off_starts_anew(here, tmp_path):
    folder = tmp_path / folder_name(BASE)
    for text in ("", '{"kind": "ru'):  # killed while its first line was written
        folder.mkdir(exist_ok=True)
        (folder / records.FILE).write_text(text)
        swept = sweep([BASE], tmp_path, keep_checkpoints=False, **ALONE)
        assert recorded_facts(swept.runs[0]) == recorded_facts(
            train(BASE, tmp_path / str(len(text)) / folder.name, Silent())
        )
        assert not (folder / checkpoint.CHECKPOINT_FILE).exists()
        (folder / records.FILE).unlink()


# --- the index, the bars


def fake_run(out, i):
    line = {"test_accuracy": i / 100, "heldout_accuracy": None}
    header = {
        "arm": "an arm with a long name, so that lines are not written at one go" * 20,
        "config": {"seed": i},
        "config_hash": str(i),
    }
    return records.Run(
        out / f"run-{i}", header, [line], {"status": "finished", "seconds": float(i)}
    )


def test_the_index_has_each_run_once_though_many_write_it_and_one_was_killed_while_writing(
    tmp_path,
):
    (tmp_path / INDEX).write_text('{"name": "run-0", "arm": "cut o')
    context = multiprocessing.get_context("fork")

    def write(first):
        for i in range(first, first + 20):
            add_to_index(tmp_path, [fake_run(tmp_path, i)])

    writers = [context.Process(target=write, args=(first,)) for first in (0, 0, 10, 10, 20, 20)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    lines = [json.loads(line) for line in (tmp_path / INDEX).read_text().splitlines()]
    assert [process.exitcode for process in writers] == [0] * 6
    assert sorted(line["seed"] for line in lines) == list(range(40))
    assert all(line["test_last"] == line["seed"] / 100 for line in lines)


def test_the_bar_over_all_runs_counts_samples_and_starts_at_what_checkpoints_hold(tmp_path):
    short, long = BASE, dataclasses.replace(BASE, passes=6.0)
    train(long, tmp_path / folder_name(long), Silent(), steps=20)
    plan = jobs([short, long], tmp_path, data_folder=None, keep_checkpoints=True, command=None)
    board = Board(QUIET, plan, {})
    task = board.bars.tasks[board.whole]
    there = records.read(tmp_path / folder_name(long)).evals[-1]["samples"]
    assert (task.completed, task.total) == (pytest.approx(there, abs=1), pytest.approx(8 * 270))
    board.show_progress(folder_name(short), JobProgress(0.5, ""))
    board.draw()
    assert task.completed == pytest.approx(there + 270)
    (tmp_path / folder_name(long) / checkpoint.CHECKPOINT_FILE).unlink()
    assert plan[folder_name(long)].recorded_progress() == JobProgress(0.0, "")


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_the_work_of_a_run_is_about_what_it_draws(name):
    data = load_dataset(name)
    assert PICTURES[name] == len(data.train_x)


# --- what is refused; the command


def test_what_cannot_be_swept_is_refused_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError,
        match=f"{folder_name(subset(BASE))}: replay must name a run of the plan, "
        "or one that is finished in ",
    ):
        sweep([subset(BASE)], tmp_path, **ALONE)
    with pytest.raises(ConfigError, match="workers must be at least 1; got 0."):
        sweep([BASE], tmp_path, **ALONE | {"workers": 0})
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "gaf_lab.sweeps.ray_tasks", raising=False)
    with pytest.raises(
        ConfigError,
        match="engine 'ray' needs the package ray; it is not installed. "
        r"pip install 'gaf\[ray\]', or use",
    ):
        sweep([BASE], tmp_path, engine="ray", **ALONE)
    assert not list(tmp_path.glob("*/*"))


def test_the_command_shows_the_plan_runs_it_and_says_what_failed(
    here, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(cli, "Console", lambda **options: Console(**{"width": 200, **options}))
    words = ["sweep", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")]
    text = FILE.replace("[0, 1]", "[0]").replace("passes = 4", "passes = 2")
    (tmp_path / "plan.toml").write_text(text + '[[arms]]\nb = 2000\nlabel = "large"\n')
    gaf, control, mean, large = [
        folder_name(from_file(tmp_path / "plan.toml")[i]) for i in (1, 0, 2, 3)
    ]
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{control:40} not begun; replays {gaf}",
        f"{gaf:40} not begun",
        f"{mean:40} not begun",
        f"{large:40} not begun",
        "0 of 4 runs are finished.",
    ]
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "3 of 4 runs are finished, in" in out
    assert out.count(f"{large} failed: ConfigError: b must not exceed the training samples") == 1
    assert out.splitlines()[-1] == (
        "Failed: 1, each shown above with its reason. Fix that, and give the same command: it "
        "tries them again, and repeats no run that is finished."
    )
    assert (
        records.read(tmp_path / "out" / gaf).header["command"]
        == f"gaf {' '.join(words)} --workers 1"
    )
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 4 runs are finished."
    assert cli.main(["sweep", "demo-gfa"]) == 2
    assert "got 'demo-gfa'. Did you mean 'demo-gaf'?" in capsys.readouterr().err
