"""Runs in turns in one process end as runs in processes; one that fails disturbs no other."""

import dataclasses
import io

from rich.console import Console
from test_sweep import BASE, MEAN, QUIET, assert_index_is_whole, assert_same_runs, subset

from gaf_lab.sweeps.in_turns import InTurns
from gaf_lab.sweeps.sweep import sweep


def on_device(config):
    return dataclasses.replace(config, engine="device")


# the last one is plain
PLAN = [
    on_device(BASE),
    on_device(MEAN),
    subset(on_device(BASE)),
    dataclasses.replace(BASE, seed=1),
]


def test_runs_in_turns_are_those_of_processes(tmp_path):
    for engine in ("together", "local"):
        found = sweep(
            PLAN, tmp_path / engine, workers=3, data_folder=None, console=QUIET, engine=engine
        )
        assert not found.failed
        assert len(found.runs) == len(PLAN)
    assert_same_runs(tmp_path / "together", tmp_path / "local")
    assert_index_is_whole(tmp_path / "together")


def test_at_most_as_many_as_workers_are_under_way_and_they_do_take_turns(tmp_path, monkeypatch):
    most, turns = [0], []
    given = InTurns.events

    def watched(self, seconds):
        most[0] = max(most[0], len(self.runs))
        turns.append(tuple(self.runs))
        return given(self, seconds)

    monkeypatch.setattr(InTurns, "events", watched)
    configs = [
        dataclasses.replace(on_device(MEAN), seed=seed, passes=12.0, eval_every=4.0)
        for seed in range(3)
    ]
    sweep(configs, tmp_path, workers=2, data_folder=None, console=QUIET, engine="together")
    assert most[0] == 2
    # a run of 150 steps gives way more than once
    assert sum(len(names) == 2 for names in turns) > 2


def test_a_run_that_diverges_is_told_of_and_the_others_end(tmp_path):
    out = io.StringIO()
    bad = dataclasses.replace(on_device(MEAN), lr=1e30)
    found = sweep(
        [bad, on_device(MEAN)],
        tmp_path,
        workers=2,
        data_folder=None,
        console=Console(file=out),
        engine="together",
    )
    assert [run.header["config"]["lr"] for run in found.runs] == [MEAN.lr]
    assert ["Diverged" in why for why in found.failed.values()] == [True]
