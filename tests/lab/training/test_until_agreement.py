"""Runs whose steps grow until their micro-gradients agree, and the controls with given sizes."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gaf_lab.records.run import Run
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import folder_name, from_file
from gaf_lab.sweeps.sweep import sweep
from gaf_lab.training.controls import Sizes, even_sizes
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import assert_same, final_state

SMALL = TrainConfig(
    dataset="digits",
    policy="until-agreement",
    rho=0.8,
    at_most=9,
    k=1,
    b=16,
    passes=4.0,
    eval_every=1.0,
    lr=0.02,
    schedule="cosine",
)
PLAN = """
seeds = [3, 5]

[base]
dataset = "digits"
k = 1
b = 16
passes = 2

[[arms]]
policy = "until-agreement"
rho = 0.6

[[arms]]
policy = "replay-sizes"
replay = "until agreement, rho 0.6"

[[arms]]
policy = "mean-size"
replay = "until agreement, rho 0.6"
"""


class StopAfter(Silent):
    """Ctrl-C at the first step that has seen so many micro-batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, step: int, outcome: Any) -> None:
        if step >= self.after:
            raise KeyboardInterrupt


def run_of(config: TrainConfig, folder: Path) -> Run:
    return train(config, folder, Silent())


def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, rate_by="sqrt", sam=0.05, ema=0.9)
    whole = run_of(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", StopAfter(200))
    resumed = train(config, tmp_path / "cut", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert resumed.rows == whole.rows
    assert resumed.evals[-1]["train_loss"] == whole.evals[-1]["train_loss"]


def test_every_micro_batch_counts_once_and_no_step_reaches_over_an_evaluation(
    tmp_path: Path,
) -> None:
    run = run_of(dataclasses.replace(SMALL, rho=0.4, at_most=30), tmp_path)
    assert sum(run.rows) == run.evals[-1]["step"] == run.evals[-1]["samples"] / 16
    assert len(run.rows) == run.evals[-1]["steps_taken"]
    assert max(run.rows) <= 30
    assert len(set(run.rows)) > 3
    assert {line["step"] for line in run.evals} <= set(itertools.accumulate(run.rows))


def test_steps_of_one_size_are_those_of_plain_averaging_to_the_bit(tmp_path: Path) -> None:
    whole = {"schedule": "constant", "eval_every": 4.0}
    grown = dataclasses.replace(SMALL, rho=0.9999, at_most=4, **whole)
    plain = dataclasses.replace(SMALL, policy="mean", k=4, **whole)
    runs = run_of(grown, tmp_path / "grown"), run_of(plain, tmp_path / "plain")
    assert set(runs[0].rows) == {4} == set(runs[1].rows)
    for name in ("test_loss", "train_loss", "distance_mean", "noise_scale"):
        assert runs[0].evals[0][name] == runs[1].evals[0][name]


def test_the_controls_take_the_recorded_sizes_and_their_mean(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    configs = from_file(plan)
    recorded = {config.seed: folder_name(config) for config in configs[::3]}
    replays = [Path(recorded[seed]) for seed in (5, 3)]  # the other seed's
    assert [config.replay for config in configs[1::3]] == replays
    assert [config.replay for config in configs[2::3]] == [Path(recorded[seed]) for seed in (3, 5)]
    how: dict[str, Any] = {"workers": 1, "data_folder": None, "engine": "together"}
    swept = sweep(configs, tmp_path, console=Console(quiet=True), **how)
    assert not swept.failed
    runs = {(run.arm.split(",")[0], run.seed): run for run in swept.runs}
    for seed, other in ((3, 5), (5, 3)):
        own = runs["until agreement", seed]
        assert runs["replayed sizes", seed].rows == runs["until agreement", other].rows
        sizes = runs["mean size", seed].rows
        assert sum(sizes) == sum(own.rows)
        # evaluations cut at most one step each
        assert abs(len(sizes) - len(own.rows)) <= len(own.evals)
        assert runs["replayed sizes", seed].rows != own.rows


def test_even_sizes_have_the_mean_and_differ_by_at_most_one() -> None:
    sizes = even_sizes([2, 3, 9, 4, 1])
    assert set(sizes) == {3, 4} and sum(sizes[:5]) == 19 and sum(sizes[:10]) == 38
    assert set(even_sizes([4, 4])) == {4}


def test_sizes_that_run_out_are_named() -> None:
    sizes = Sizes([2], "constant")
    assert not sizes.suffices(1, None) and sizes.suffices(2, None)
    sizes.learn(2, (1.0, 2.0))
    with pytest.raises(ValueError, match="recorded run must be as long as this one; it has 1 step"):
        sizes.suffices(1, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 8}, "k must be 1 for policy 'until-agreement', which adds micro-batches up one by"),
        ({"rho": 1.0}, "rho must be above 0 and below 1; got 1.0"),
        ({"at_most": 1}, "at_most must be at least 2; got 1"),
        ({"schedule_waits": True}, "schedule_waits must be off for policy 'until-agreement'"),
        ({"policy": "replay-sizes"}, "replay must be set for policy 'replay-sizes'"),
        ({"policy": "mean", "rate_by": "sqrt"}, "rate_by must be 'constant' for a policy with k"),
    ],
)
def test_configs_that_cannot_grow_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_the_device_engine_refuses_it(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, engine="device")
    with pytest.raises(
        ConfigError, match="policy must .* take k micro-batches per step for engine"
    ):
        run_of(config, tmp_path)
