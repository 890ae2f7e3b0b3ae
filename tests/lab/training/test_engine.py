"""The device engine decides and trains as the plain path does, without the host, and is captured.

Both read each other's checkpoints. Runs that share a process give the same results as alone.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gaf
from gaf.device.rows import rows_without_waiting
from gaf.device.stacked import StackedRows
from gaf_lab.data.make_data import make_run_data
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.device_engine import OnDevice
from gaf_lab.training.device_step import DeviceStep
from gaf_lab.training.diverged import Diverged
from gaf_lab.training.engines import check_device_engine, uses_device_engine
from gaf_lab.training.loop import Training
from gaf_lab.training.make import make_policy
from gaf_lab.training.objective import make_objective
from gaf_lab.training.optimizers import make_optimizer
from gaf_lab.training.run import train
from gaf_lab.training.schedule import rates_ahead
from gaf_lab.training.techniques import ema_model
from gaf_lab.training.together import in_turns, train_together
from helpers.fakes import Silent

SMALL = TrainConfig(
    dataset="digits",
    limit=300,
    model="mlp",
    seed=1,
    k=4,
    b=10,
    passes=4.0,
    eval_every=2.0,
    lr=0.02,
    tau=0.9,
    weight_decay=5e-4,
    nesterov=True,
)  # 27 steps
CONVNET: dict[str, Any] = {"model": "convnet", "augment": True}
ONE: dict[str, Any] = {"policy": "mean", "k": 1, "b": 40, "ema": 0.9}
NOISY: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.4}
WEIGHED: list[dict[str, Any]] = [
    {"tau": 0.8, "ema": 0.9},
    CONVNET | ONE,
    ONE | NOISY | {"agreement": "prototype", "passes": 8.0},
    ONE | NOISY | {"agreement": "prototype", "loss": "elr", "passes": 8.0},
    ONE | NOISY | {"agreement": "vote", "passes": 8.0},
    ONE | NOISY | {"agreement": "loss", "loss": "gce", "passes": 8.0},
    ONE | NOISY | {"audit_passes": 3.0, "loss": "elr", "passes": 6.0},
    ONE | {"audit_passes": 1.0, "suspects": "none", "optimizer": "adam", "lr": 0.001},
]


# whole runs: shapes are checked in the library's own tests, and take half the time
pytestmark = pytest.mark.usefixtures("unchecked")


class Keeps(Silent):
    """Keeps every outcome."""

    def __init__(self) -> None:
        self.outcomes: list[gaf.Outcome] = []

    def stepped(self, step, outcome):
        self.outcomes.append(outcome)


def run(config, folder, **options):
    keeps = Keeps()
    found = train(config, folder, keeps, **options)
    return found, keeps.outcomes, torch.load(folder / checkpoint.CHECKPOINT_FILE, weights_only=True)


def assert_same(a, b, where="", but=("seconds", "records_size")):
    """Bit for bit, through nested states."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(but):
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or a != a, where


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of GAF that skips its first steps, for the controls that replay it."""
    folder = tmp_path_factory.mktemp("recorded") / "gaf"
    found = train(dataclasses.replace(SMALL, tau=0.8), folder, Silent())
    assert found.rows[:3] == [0, 0, 0]
    assert 5 < sum(n > 0 for n in found.rows) < 22
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": 0.8},
        {"threshold": "auto"},
        {"threshold": "noise-floor", "threshold_by": 1.0, "schedule": "cosine"},
        {"tau": 0.8, "average": "halving", "schedule": "cosine", "schedule_waits": True},
        {"start": "best", "schedule": "multi-step"},
        {"start": "worst", "schedule": "cosine"},
        {
            "policy": "mean",
            "momentum": 0.0,
            "nesterov": False,
            "schedule": "plateau",
            "patience": 0,
            "eval_every": 0.5,
        },
        {"policy": "random-skip", "schedule": "cosine", "schedule_waits": True},
        {"policy": "replay-skip", "schedule": "cosine"},
        {"policy": "random-subset", "schedule": "multi-step", "schedule_waits": True},
        {"policy": "random-subset", "loss": "gce", "optimizer": "adamw", "lr": 0.001},
        {"loss": "elr", "early_stopping": 1, "eval_every": 0.5},
        {"optimizer": "adam", "lr": 0.001, "tau": 0.8, "label_smoothing": 0.1},
        CONVNET,
        CONVNET | {"start": "best", "channels_last": True},
        CONVNET | {"policy": "random-skip", "autocast": "bfloat16"},
        {"k": 1, "b": 40},
        *WEIGHED,
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:gaf. One micro-gradient")
@pytest.mark.filterwarnings("ignore:gaf. .* labels look wrong")
def test_the_engine_decides_and_trains_as_the_plain_path(tmp_path, recorded, changes):
    """No rounding is the same: a fused optimizer, a float32 learning rate, products in chunks."""
    config = dataclasses.replace(SMALL, replay=recorded, **changes)
    plain, device = (
        run(dataclasses.replace(config, engine=name), tmp_path / name)
        for name in ("plain", "device")
    )
    assert plain[0].rows == device[0].rows
    for a, b in zip(plain[1], device[1], strict=True):
        assert (a.accepted, a.stepped, a.weights) == (b.accepted, b.stepped, b.weights)
        # weights differ by float32's rounding, which 27 steps multiply
        assert a.distances == pytest.approx(b.distances, abs=2e-4, nan_ok=True)
        assert a.norms2 == pytest.approx(b.norms2, rel=2e-3)
    for a, b in zip(plain[0].evals, device[0].evals, strict=True):
        for name in ("step", "steps_taken", "lr", "rows", "acceptance"):
            assert a[name] == b[name]
        assert a.get("restarted") == b.get("restarted")
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert plain[2]["scheduler"] == device[2]["scheduler"]
    learned = [
        found[2]["accumulator"]["policy"].pop("tau", {"state": []})["state"]
        for found in (plain, device)
    ]
    assert learned[0] == pytest.approx(learned[1], rel=1e-3)
    assert bool(learned[0]) == (config.threshold != "fixed")
    assert plain[2]["accumulator"]["policy"] == device[2]["accumulator"]["policy"]
    assert plain[2]["optimizer"]["param_groups"] == device[2]["optimizer"]["param_groups"]
    # Adam divides rounding by rounding where gradients vanish
    lr = 2 * config.lr if config.optimizer.startswith("adam") else 2e-4
    for (name, a), b in zip(plain[2]["model"].items(), device[2]["model"].values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=lr, rtol=1e-3), name
    for name, a in (plain[2]["average"] or {}).items():
        b = device[2]["average"][name]
        assert torch.allclose(a.float(), b.float(), atol=lr, rtol=1e-3), name


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": 0.8},
        CONVNET,
        {"policy": "mean"},
        {"optimizer": "adamw", "weight_decay": 0.125},
        {"start": "best"},
    ],
    ids=str,
)
def test_with_the_same_optimizer_the_weights_are_the_same_bits(tmp_path, monkeypatch, changes):
    config = dataclasses.replace(SMALL, lr=2**-7, **changes)  # a learning rate that float32 holds
    _, ours, device = run(dataclasses.replace(config, engine="device"), tmp_path / "device")
    monkeypatch.setattr(
        "gaf_lab.training.loop.make_optimizer",
        lambda config, rate, params: make_optimizer(config, rate, params, fused=True),
    )
    _, theirs, plain = run(dataclasses.replace(config, engine="plain"), tmp_path / "plain")
    assert [a.accepted for a in ours] == [a.accepted for a in theirs]
    assert any(a.stepped for a in ours)
    assert_same(plain["model"], device["model"])
    assert_same(plain["optimizer"]["state"], device["optimizer"]["state"])


def test_a_skipped_step_leaves_parameters_and_optimizer_state_bitwise_alone():
    for changes in (
        {"optimizer": "sgd"},
        {"optimizer": "adamw", "lr": 0.001},
        {"momentum": 0.0, "nesterov": False},
    ):
        step = fresh(policy="random-skip", step_probability=0.0, **changes)
        before = [t.clone() for t in step.state()[:-4]]
        step()
        assert int(step.at) == 1
        assert int(step.taken) == 0
        assert all(torch.equal(a, b) for a, b in zip(step.state()[:-4], before, strict=True))
        step.tables["weights"].fill_(0.25)
        step()
        assert int(step.taken) == 1
        for p, was in zip(step.params, before, strict=False):
            assert not torch.equal(p, was)
            assert p.isfinite().all()
            assert p.abs().max() < 10  # 1e34 where momentum was not initialised


def test_warming_up_leaves_everything_as_it_was():
    step = fresh(model="convnet", loss="elr", threshold="auto")
    before, learned = [t.clone() for t in step.state()], step.policy.state_dict()
    step.warm_up()
    assert all(torch.equal(a, b) for a, b in zip(step.state(), before, strict=True))
    step()
    assert step.policy.state_dict() != learned
    step.policy.load_state_dict(learned)
    assert step.policy.state_dict() == learned


@pytest.mark.filterwarnings("ignore:gaf. .* labels look wrong")
def test_a_restart_launches_nothing_beyond_it_and_captures_anew(tmp_path, monkeypatch):
    launched, launch = [], OnDevice.launch

    def note(self, steps, rates):
        launched.append((steps, self._call is None))
        launch(self, steps, rates)

    def as_on_a_gpu(step):
        step.warm_up()
        return step

    monkeypatch.setattr(OnDevice, "launch", note)
    monkeypatch.setattr("gaf_lab.training.device_engine.capture", as_on_a_gpu)
    once = {"audit_passes": 64 / 27, "suspects": "none", "passes": 3.0, "eval_every": 3.0}
    config = dataclasses.replace(SMALL, **ONE | {"b": 10}, **once)
    plain, device = (
        run(dataclasses.replace(config, engine=name), tmp_path / name)[2]["model"]
        for name in ("plain", "device")
    )
    assert launched == [(range(64), True), (range(64, 81), True)]
    for (name, a), b in zip(plain.items(), device.values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-4, rtol=1e-3), name


def fresh(**changes) -> DeviceStep:
    """A step whose tables are those of the run's first steps."""
    training = Training(dataclasses.replace(SMALL, engine="device", **changes), None)
    on_device = training.accumulator
    assert isinstance(on_device, OnDevice)
    on_device._call = lambda: None
    on_device.launch(range(20), training.schedule.next_rates(20))
    return on_device.one


# Nothing is asked of the host


class OnlyThere(TorchDispatchMode):
    """Fails where an operation sees a tensor that is not on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = "_fused_" in str(func)  # has no form for the meta device
        out = None if fused else func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{func} sees the host"
        return out


class NothingFromPython(TorchFunctionMode):
    """Fails where a tensor is made of numbers in Python, which no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), (
            f"{func} brings data from the host"
        )
        return func(*args, **(kwargs or {}))


@pytest.fixture
def meta(monkeypatch):
    """A step whose tensors have no data: it fails if anything reads one.

    The library takes an accelerator's path.
    """
    # autocast supports no meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    def make(**changes):
        config = dataclasses.replace(SMALL, engine="device", **changes)
        problem = make_run_data(config, None, torch.device("cpu"))
        problem = dataclasses.replace(
            problem, train=problem.train.to("meta"), device=torch.device("meta")
        )
        model = problem.new_model()
        optimizer = make_optimizer(config, config.lr, list(model.parameters()), fused=True)
        optimizer._need_device_dtype_check_for_fused = False
        average = ema_model(model, config.ema) if config.ema else None
        parts = problem, model, make_objective(problem, model), make_policy(config), optimizer
        return DeviceStep(*parts, average)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": "best"},
        {"start": "worst"},
        {"average": "halving"},
        {"policy": "mean"},
        {"policy": "random-skip"},
        {"policy": "random-subset"},
        {"policy": "replay-skip"},
        {"optimizer": "adam"},
        {"optimizer": "adamw", "schedule_waits": True},
        {"momentum": 0.0, "nesterov": False},
        {"loss": "gce"},
        {"loss": "elr"},
        CONVNET,
        {"threshold": "auto"},
        {"threshold": "signal"},
        {"threshold": "noise-floor"},
        {"threshold": "quantile"},
        *WEIGHED,
        pytest.param(CONVNET | {"model": "resnet18", "limit": 60}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_never_looks_at_the_host_nor_takes_anything_from_it(meta, recorded, changes):
    step = meta(replay=recorded, **changes)
    step.state()  # a threshold's first state comes from Python, when a step is warmed up
    with NothingFromPython(), OnlyThere():
        step()


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: bool(t),
        lambda t: t[None].nonzero(),
        lambda t: torch.zeros(3, device="meta")[t[None].expand(3) > 0],
        lambda t: t + torch.tensor(1.0, device="meta"),
        lambda t: t + torch.ones(()),
        lambda t: torch.ones(3).to("meta") + t,
    ],
)
def test_and_that_would_be_seen(look: Callable[[torch.Tensor], Any]):
    with (
        pytest.raises((AssertionError, RuntimeError, NotImplementedError)),
        NothingFromPython(),
        OnlyThere(),
    ):
        look(torch.zeros((), device="meta"))


# A capture


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: records operations and their memory, and repeats them.

    A repetition runs none of the step's Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "profiler" not in str(func):
            self.entries.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.entries:
            inputs = {
                t.untyped_storage().data_ptr()
                for t in tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor)
            }
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": "best"},
        {"average": "halving"},
        {"policy": "random-skip"},
        {"optimizer": "adamw", "lr": 0.001},
        CONVNET,
        {"schedule": "cosine", "schedule_waits": True},
        {"loss": "elr"},
        {"threshold": "auto"},
        {"threshold": "signal"},
        {"threshold": "noise-floor"},
        {"threshold": "quantile"},
        *WEIGHED,
    ],
    ids=str,
)
def test_a_step_that_is_noted_once_and_repeated_is_a_step(changes, monkeypatch):
    """What a graph does: no state that moves a step may lie in Python."""
    # as on an accelerator, where rows are never walked in plain numbers
    monkeypatch.setattr("gaf.rules.visits.FEW_NUMBERS", 0)
    lived, noted = fresh(**changes), fresh(**changes)
    for _ in range(20):
        lived()
    tape = Tape()
    with tape:
        noted()
    for _ in range(19):
        tape.replay()
    assert int(noted.at) == 20
    assert 0 < int(noted.taken) <= 20
    for a, b in zip(lived.state(), noted.state(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


# The library's part: weights that stay on the device


@pytest.mark.parametrize(
    "policy",
    [
        gaf.GAF(1.0),
        gaf.GAF(0.9),
        gaf.GAF(1.0, average="halving"),
        gaf.GAF(1.0, start="best"),
        gaf.Mean(),
    ],
    ids=repr,
)
def test_weights_on_the_device_give_the_update_that_weights_on_the_host_give(policy):
    for trial in range(10):
        rng = torch.Generator().manual_seed(trial)
        shapes = (3,), (4, 2), (5000,)
        params = [torch.zeros(shape) for shape in shapes]
        rows, other = (rows_without_waiting(policy, [True] * 3, params) for _ in range(2))
        for i in range(5):
            row = [torch.randn(shape, generator=rng) for shape in shapes]
            if i == 2 and not isinstance(policy, gaf.Mean):
                # absent: its weight is zero, and zero times it is not looked at
                row[1][0, 0] = torch.nan
            for holder in (rows, other):
                holder.add([grad.clone() for grad in row])
        weights = rows.decide()[0].weights
        if not weights.any():
            continue
        for ours, theirs in zip(
            rows.update_on_device(weights), other.update(weights.tolist()), strict=True
        ):
            # on the host a weighted row is added with one rounding
            torch.testing.assert_close(ours, theirs)
            assert ours.isfinite().all()
        assert isinstance(rows, StackedRows) == (policy == gaf.GAF(1.0, start="best"))


# Schedules, checkpoints, ends


@pytest.mark.parametrize("schedule", ["cosine", "multi-step"])
def test_rates_ahead_are_those_that_come(schedule):
    training = Training(dataclasses.replace(SMALL, schedule=schedule), None)
    scheduler, group = training.schedule.scheduler, training.optimizer.param_groups[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(0, 27, 9):
            before = dict(scheduler.state_dict())
            ahead = rates_ahead(scheduler, 10)
            assert scheduler.state_dict() == before
            for step in range(9):
                assert group["lr"] == ahead[step], (start, step)
                scheduler.step()
            assert group["lr"] == ahead[9]


class Stop(Silent):
    def __init__(self, after):
        self.after = after

    def stepped(self, step, outcome):
        if step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "cosine", "schedule_waits": True},
        pytest.param(
            {"policy": "random-skip", "optimizer": "adamw", "lr": 0.001}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_bit_for_bit_and_on_the_other_path_too(
    tmp_path, monkeypatch, changes
):
    config = dataclasses.replace(SMALL, engine="device", passes=6.0, **changes)
    _, outcomes, whole = run(config, tmp_path / "whole")
    monkeypatch.setattr(TrainConfig, "hash", "the same")  # the engine is a part of it
    for first, then in (("device", "device"), ("device", "plain"), ("plain", "device")):
        folder = tmp_path / f"{first} {then}"
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(config, engine=first), folder, Stop(after=36))
        assert records.read(folder).end["status"] == "interrupted"
        found, rest, state = run(dataclasses.replace(config, engine=then), folder, resume=True)
        step = found.evals[-1]["step"] - len(rest)
        assert 0 < step < 36
        assert [o.accepted for o in rest] == [o.accepted for o in outcomes[step:]]
        assert state.keys() == whole.keys()
        if first == then:
            assert_same(state | {"config_hash": ""}, whole | {"config_hash": ""})
        else:
            lr = 2 * config.lr if config.optimizer == "adamw" else 1e-4
            for a, b in zip(state["model"].values(), whole["model"].values(), strict=True):
                assert torch.allclose(a, b, atol=lr, rtol=1e-3)
            assert state["scheduler"] == whole["scheduler"]
            assert state["accumulator"]["policy"] == whole["accumulator"]["policy"]
            assert (
                state["accumulator"]["telemetry"]["totals"]
                == whole["accumulator"]["telemetry"]["totals"]
            )


def test_divergence_is_noticed_at_the_step_where_it_was(tmp_path):
    config = dataclasses.replace(SMALL, policy="mean", lr=1e18)
    said = []
    for name in ("plain", "device"):
        with pytest.raises(Diverged) as caught:
            train(dataclasses.replace(config, engine=name), tmp_path / name, Silent())
        said.append(str(caught.value).replace(str(tmp_path / name), "FOLDER"))
        assert records.read(tmp_path / name).end["status"] == "diverged"
    assert said[0] == said[1]


# Together


def test_runs_that_share_a_process_are_what_they_are_alone(tmp_path):
    changes: list[dict[str, Any]] = [{}, {"seed": 2, "policy": "mean"}, CONVNET | {"passes": 2.0}]
    configs = [dataclasses.replace(SMALL, engine="device", **c) for c in changes]
    alone = [run(config, tmp_path / f"alone {i}") for i, config in enumerate(configs)]
    keeps = [Keeps() for _ in configs]
    before = torch.get_rng_state()
    found = train_together(configs, [tmp_path / f"{i}" for i in range(3)], keeps)
    assert torch.equal(torch.get_rng_state(), before)
    for i, (want, outcomes, state) in enumerate(alone):
        assert isinstance(found[i], records.Run)
        assert found[i].rows == want.rows
        assert keeps[i].outcomes == outcomes or all(
            a.accepted == b.accepted for a, b in zip(keeps[i].outcomes, outcomes, strict=True)
        )
        assert_same(
            torch.load(tmp_path / f"{i}" / checkpoint.CHECKPOINT_FILE, weights_only=True), state
        )


def test_a_run_that_ends_badly_leaves_the_others_alone(tmp_path):
    good = dataclasses.replace(SMALL, engine="device")
    bad = dataclasses.replace(good, policy="mean", lr=1e18)
    impossible = dataclasses.replace(good, sam=0.1)
    found = train_together(
        [bad, good, impossible], [tmp_path / name for name in "abc"], [Silent()] * 3
    )
    assert isinstance(found[0], Diverged)
    assert isinstance(found[1], records.Run)
    assert found[1].end["status"] == "finished"
    assert isinstance(found[2], ConfigError)


def test_ctrl_c_closes_the_records_of_all(tmp_path):
    config = dataclasses.replace(SMALL, engine="device")
    with pytest.raises(KeyboardInterrupt):
        train_together(
            [config, config], [tmp_path / "a", tmp_path / "b"], [Silent(), Stop(after=5)]
        )
    assert [records.read(tmp_path / name).end["status"] for name in "ab"] == ["interrupted"] * 2


def test_runs_go_round():
    order = []

    def turns(name, count):
        for _ in range(count):
            order.append(name)
            yield
        return name

    assert in_turns([turns("a", 2), turns("b", 1)]) == ["a", "b"]
    assert order == ["a", "b", "a"]


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 1.0}, "mixup must be 0 for engine 'device'; got 1.0. Use --engine plain."),
        ({"sam": 0.1}, "sam must be 0 for engine 'device'; got 0.1. Use --engine plain."),
        (
            {"agreement": "prototype", "shuffle_weights": True},
            "shuffle_weights must be off for engine 'device'; got True. Use --engine plain.",
        ),
        (
            {"bn": "accepted"},
            "bn must be 'all' for engine 'device'; got 'accepted'. Use --engine plain.",
        ),
        (
            {"scope": "group"},
            "scope must be 'all' for engine 'device'; got 'group'. Use --engine plain.",
        ),
        (
            {"compile": True},
            "compile must be off for engine 'device'; got True. Use --engine plain.",
        ),
        (
            {"optimizer": "rmsprop"},
            "optimizer must have a fused form, which skips without the host for engine 'device'; "
            "got 'rmsprop'",
        ),
        (
            {"dataset": "imagenet"},
            "dataset must fit into the device's memory for engine 'device'; got 'imagenet'",
        ),
    ],
)
def test_what_it_cannot_run_is_said_before_anything_is_written(tmp_path, changes, message):
    config = dataclasses.replace(SMALL, engine="device", **changes)
    with pytest.raises(ConfigError, match=f"^{message}"):
        train(config, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()
    assert not uses_device_engine(
        dataclasses.replace(config, engine="auto"), torch.device("cuda"), 1
    )


def test_auto_takes_the_engine_on_cuda_alone():
    auto = dataclasses.replace(SMALL, engine="auto")
    assert uses_device_engine(auto, torch.device("cuda"), 1)
    assert not uses_device_engine(auto, torch.device("cpu"), 1)
    assert not uses_device_engine(auto, torch.device("cuda"), 4)
    assert not uses_device_engine(
        dataclasses.replace(SMALL, engine="plain"), torch.device("cuda"), 1
    )
    with pytest.raises(
        ConfigError,
        match=r"engine must not be 'device' on several ranks; got it on 4. Use --engine plain.",
    ):
        check_device_engine(dataclasses.replace(SMALL, engine="device"), 4)


# On a GPU


gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device: a captured graph is run nowhere else",
)


@gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": "best"},
        {"policy": "random-skip"},
        {"optimizer": "adamw", "lr": 0.001},
        CONVNET,
    ],
    ids=str,
)
def test_a_captured_run_decides_as_the_plain_path_on_the_gpu(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(SMALL, device="cuda", **changes)
    plain, device = (
        run(dataclasses.replace(config, engine=name), tmp_path / name)
        for name in ("plain", "device")
    )
    assert plain[0].rows == device[0].rows
    for a, b in zip(plain[1], device[1], strict=True):
        assert a.distances == pytest.approx(b.distances, abs=1e-3, nan_ok=True)


@gpu
def test_a_captured_step_makes_no_synchronising_call() -> None:
    training = Training(dataclasses.replace(SMALL, device="cuda", engine="device"), None)
    assert isinstance(training.accumulator, OnDevice)
    training.accumulator.one.warm_up()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.accumulator.one()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_captured_runs_side_by_side_are_what_they_are_alone(tmp_path: Path) -> None:
    configs = [
        dataclasses.replace(SMALL, device="cuda", engine="device", seed=seed) for seed in range(4)
    ]
    alone = [train(config, tmp_path / f"alone {config.seed}", Silent()) for config in configs]
    found = train_together(
        configs, [tmp_path / f"{config.seed}" for config in configs], [Silent()] * 4
    )
    assert [one.rows for one in alone] == [
        one.rows for one in found if isinstance(one, records.Run)
    ]
