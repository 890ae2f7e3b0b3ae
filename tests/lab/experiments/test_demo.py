"""The demo at a size that a test can run: all arms, paired, and Ctrl-C keeps what is finished."""

import dataclasses
import io
import signal

import pytest
from rich.console import Console

from gaf_lab.commands.demo import run_demo
from gaf_lab.experiments import demo as job
from gaf_lab.experiments.demo import clear, demo, demo_arms, finished_runs
from gaf_lab.records import run as records
from gaf_lab.report.table import results_table
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.presets import DEMO
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import wait_until
from helpers.warm import WARM

TINY = dataclasses.replace(DEMO, passes=2.0, eval_every=1.0)


def test_the_demo_runs_every_arm_for_every_seed_with_the_control_bound_to_its_own_gaf_run(tmp_path):
    demo(tmp_path, Console(quiet=True), seeds=2, base=TINY)
    runs = finished_runs(tmp_path, 2, TINY)
    assert [(r.arm, r.seed) for r in runs] == [
        (a, s) for s in range(2) for a in ("GAF", "averaging", "random subset")
    ]
    rows = {(r.arm, r.seed): r.rows for r in runs}
    for seed in range(2):
        assert rows["GAF", seed] == rows["random subset", seed]
        assert set(rows["averaging", seed]) == {8}
    assert rows["GAF", 0] != rows["GAF", 1]


def test_arms_of_one_seed_differ_in_the_policy_alone():
    for config in demo_arms(3, DEMO).values():
        assert dataclasses.replace(config, policy="gaf", replay=None) == dataclasses.replace(
            DEMO, seed=3
        )


def test_ctrl_c_leaves_what_is_finished_and_reports_it(tmp_path):
    words = ["-m", "gaf_lab", "demo", "--passes", "6", "--out", tmp_path / "demo"]
    process, tmp_path = WARM.start_program(*words, out=tmp_path / "said"), tmp_path / "demo"
    wait_until(lambda: process.poll() is not None or any(finished(tmp_path)))
    assert process.poll() is None
    process.send_signal(signal.SIGINT, group=True)  # as a terminal does: to the workers as well
    out = process.finish()
    assert "Stopped. The next demo in this folder starts anew." in out
    assert 0 < len(list(finished(tmp_path))) < 9
    assert (tmp_path / "report.html").is_file()
    assert "Traceback" not in out
    assert process.returncode == 130


def finished(folder):
    for file in folder.glob("*/records.jsonl"):
        run = records.read(file.parent)
        if run.end and run.end["status"] == "finished":
            yield run


def test_a_demo_removes_the_runs_of_an_earlier_one_and_no_other(tmp_path):
    demo(tmp_path, Console(quiet=True), seeds=1, base=TINY)
    mine = dataclasses.replace(TINY, dataset="digits")
    train(mine, tmp_path / "mine", Silent(), command="gaf train --out mine")
    clear(tmp_path)
    assert [file.parent.name for file in tmp_path.glob("*/records.jsonl")] == ["mine"]
    train(mine, tmp_path / "gaf-0", Silent(), command="gaf train --out gaf-0")
    with pytest.raises(
        ConfigError, match="a demo's under a demo's names; gaf-0 is another run. Give"
    ):
        clear(tmp_path)
    assert records.read(tmp_path / "gaf-0").end["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "seeds", "passes"),
    [
        ([], 3, 40.0),
        (["--quick"], 1, 13.0),
        (["--quick", "--seeds", "2"], 2, 13.0),
        (["--passes", "5", "--quick"], 1, 5.0),
    ],
)
def test_a_quick_demo_is_one_seed_and_a_third_of_the_passes_unless_they_are_given(
    words, seeds, passes, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(job, "demo", lambda out, console, *sizes: asked.append(sizes))
    run_demo([*words, "--out", str(tmp_path)], Console(quiet=True))
    assert asked == [(seeds, dataclasses.replace(DEMO, passes=passes))]


def test_the_table_of_one_seed_has_no_interval(tmp_path):
    demo(tmp_path, Console(quiet=True), seeds=1, base=TINY)
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(finished_runs(tmp_path, 1, TINY)))
    text = console.file.getvalue()
    assert "random subset" in text
    assert "CI" not in text
    assert "nan" not in text
