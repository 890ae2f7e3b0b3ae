"""One dictionary of metrics; each tracker, the real one, gives back what was sent to it."""

import json
import math
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import gaf
from gaf.integrations.trackers import metrics
from gaf_lab.commands import main as cli
from gaf_lab.records import run as records
from gaf_lab.training import trackers

Logged = dict[int, dict[str, float]]  # by step


@pytest.fixture
def acc() -> gaf.Accumulator:
    """After three steps: two of three rows accepted; a skip; all accepted."""
    p = torch.nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(torch.optim.SGD([p], lr=1.0), gaf.GAF(tau=0.5))
    right, left, near, up = (
        torch.tensor(v) for v in ([1.0, 0.0], [-1.0, 0.0], [0.8, 0.6], [0.0, 1.0])
    )
    for rows in ((right, near, up), (right, left, left), (right, near, near)):
        for g in rows:
            acc.backward((p * g).sum())
        acc.step()
    return acc


def test_metrics_are_what_one_counts_by_hand(acc):
    """near lies at distance 0.2 from right; their sum is (1.8, 0.6), of squared length 3.6."""
    up, near = 1 - 0.6 / math.sqrt(3.6), 1 - (1.8 * 0.8 + 0.6 * 0.6) / math.sqrt(3.6)
    found = metrics(acc)
    assert found.pop("gaf/noise_scale") == acc.stats()["noise_scale"] > 0
    assert found == pytest.approx(
        {
            "gaf/acceptance": 3 / 6,
            "gaf/distance_mean": (0.2 + up + 2 + 2 + 0.2 + near) / 6,
            "gaf/distance_min": near,
            "gaf/stepped": 2 / 3,
            "gaf/skipped": 1,
            "gaf/tau": 0.5,
        }
    )


def test_the_noise_scale_is_in_units_of_b(acc):
    assert metrics(acc, b=20)["gaf/noise_scale"] == pytest.approx(
        20 * metrics(acc)["gaf/noise_scale"]
    )


def test_what_is_not_known_yet_is_left_out():
    p = torch.nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(torch.optim.SGD([p], lr=1.0), gaf.GAF(tau=0.5))
    assert metrics(acc) == {"gaf/skipped": 0}
    for g in ([1.0, 0.0], [-1.0, 0.0]):  # no common direction: an infinite noise scale
        acc.backward((p * torch.tensor(g)).sum())
    acc.step()
    assert acc.stats()["noise_scale"] == math.inf
    assert metrics(acc).keys() == {
        f"gaf/{n}"
        for n in ("acceptance", "distance_mean", "distance_min", "stepped", "skipped", "tau")
    }


class Ranks:
    """What `metrics` needs of a Handle; worker i has cosine 0.1 i and norm 1 + i."""

    def __init__(self, k: int) -> None:
        self.k, self.policy, self.alarms = k, gaf.Guard(), [{"rank": 1}] * 3

    def stats(self, b: float = 1) -> dict[str, Any]:
        known = {"steps": 4, "stepped": 3, "cosine_mean": 0.3, "cosine_min": -0.2}
        names = ("acceptance", "distance_mean", "distance_min", "noise_scale", "tau")
        return known | dict.fromkeys(names, math.nan)

    def workers(self) -> list[dict[str, Any]]:
        rows = [{"rank": 2 * i, "cosine": 0.1 * i, "norm": 1.0 + i} for i in range(self.k)]
        rows[0]["cosine"] = math.nan
        return rows


def test_workers_are_curves_by_their_ranks_and_many_of_them_their_extremes():
    common = {
        "gaf/stepped": 0.75,
        "gaf/skipped": 1,
        "gaf/alarms": 3,
        "gaf/cosine_mean": 0.3,
        "gaf/cosine_min": -0.2,
    }
    assert metrics(Ranks(2)) == common | {
        "gaf/worker/0/norm": 1,
        "gaf/worker/2/norm": 2,
        "gaf/worker/2/cosine": 0.1,
    }
    assert len(metrics(Ranks(16))) == len(common) + 31
    assert metrics(Ranks(17)) == common | {
        "gaf/worker/cosine_min": 0.1,
        "gaf/worker/norm_min": 1,
        "gaf/worker/norm_max": 17,
    }


def test_alarms_are_counted_under_a_policy_that_gives_them(acc):
    assert "gaf/alarms" not in metrics(acc)
    p = torch.nn.Parameter(torch.zeros(2))
    guarded = gaf.Accumulator(torch.optim.SGD([p], lr=1.0), gaf.Guard())
    assert metrics(guarded)["gaf/alarms"] == 0
    for value in (1.0, math.nan, 2.0):
        guarded.backward((p * value).sum())
    with pytest.warns(UserWarning, match="gaf: row 1: its gradient is not finite"):
        guarded.step()
    assert metrics(guarded)["gaf/alarms"] == 1


# ---------------------------------------------------------------------- what was written, read back


def from_tensorboard(folder: Path) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: Logged = {}
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            found.setdefault(scalar.step, {})[name] = scalar.value
    return found


def from_wandb(folder: Path, seconds: float = 600) -> Logged:
    """What a finished run has logged. Its service may write the file only after finish()."""
    end = time.monotonic() + seconds
    while not (found := history(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def history(folder: Path) -> Logged:
    """Reads a .wandb file: 7 bytes, then a LevelDB log of protocol buffers.

    The log has blocks of 32 KiB; a record is checksum, length, kind, data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, found, record = path.read_bytes(), 7, {}, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            line = {
                item.nested_key[0]: json.loads(item.value_json)
                for item in Record.FromString(record).history.item
            }
            record = b""
            if line:
                found[line["_step"]] = {key: value for key, value in line.items() if key[0] != "_"}
    return found


def from_trackio(run: str) -> Logged:
    from trackio.sqlite_storage import SQLiteStorage

    lines = SQLiteStorage.get_logs("gaf", run)
    return {
        line["step"]: {
            key: value for key, value in line.items() if key not in ("step", "timestamp")
        }
        for line in lines
    }


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """No network, and trackio's database in the test's own folder."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # seconds, for a machine that is busy
    for name in ("WANDB_X_SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):
        monkeypatch.setenv(name, "300")
    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path


def test_tensorboard_takes_them_as_scalars(acc, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for name, value in metrics(acc).items():
            writer.add_scalar(name, value, 3)
    # it keeps float32
    assert from_tensorboard(tmp_path) == {3: pytest.approx(metrics(acc), rel=1e-6)}


def test_weights_and_biases_takes_them_as_they_are(acc, offline):
    import wandb

    with wandb.init(project="gaf", dir=offline) as run:
        run.log(metrics(acc), step=3, commit=True)
    assert from_wandb(offline) == {3: metrics(acc)}


def test_trackio_takes_them_as_they_are(acc, offline):
    import trackio

    trackio.init(project="gaf", name="one", embed=False)
    trackio.log(metrics(acc), step=3)
    trackio.finish()
    assert from_trackio("one") == {3: metrics(acc)}


# ------------------------------------------------------------------------------ gaf train --tracker

SMALL = [
    "--dataset",
    "digits",
    "--model",
    "mlp",
    "--k",
    "3",
    "--b",
    "16",
    "--passes",
    "1",
    "--eval-every",
    "0.5",
]


@pytest.fixture
def gaf_train(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    monkeypatch.setattr(cli, "Console", lambda **options: Console(**{"width": 200, **options}))

    def call(*words: Any) -> tuple[int, str]:
        code = cli.main(["train", *SMALL, *map(str, words)])
        return code, capsys.readouterr().err

    return call


def test_gaf_train_sends_every_evaluation_to_all_that_it_is_given(gaf_train, offline):
    out = offline / "run"
    assert gaf_train("--tracker", "tensorboard", "wandb", "trackio", "--out", out)[0] == 0
    lines = records.read(out).evals
    assert len(lines) == 2
    expected = {line["samples"]: trackers.metrics(line) for line in lines}
    assert all(
        {"heldout_accuracy", "test_accuracy", "train_loss"} <= expected[step].keys()
        for step in expected
    )
    assert from_wandb(out) == expected
    assert from_trackio("run") == expected
    assert from_tensorboard(out / "tensorboard") == {
        step: pytest.approx(numbers, rel=1e-6) for step, numbers in expected.items()
    }


def test_an_option_of_its_own_still_means_tensorboard(gaf_train, tmp_path):
    assert gaf_train("--tensorboard", "--out", tmp_path)[0] == 0
    assert from_tensorboard(tmp_path / "tensorboard").keys() == {
        line["samples"] for line in records.read(tmp_path).evals
    }


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    gaf_train, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, err = gaf_train("--tracker", "wandb", "--out", tmp_path / "run")
    assert code == 2
    assert (
        "tracker wandb: its package must be installed; it is not. "
        "Install it with pip install '.[trackers]'." in err
    )
    assert not (tmp_path / "run").exists()


def test_what_weights_and_biases_refuses_becomes_one_message(gaf_train, offline, monkeypatch):
    import wandb

    def refuse(**options: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    code, err = gaf_train("--tracker", "wandb", "--out", offline / "run")
    assert code == 2
    assert (
        "tracker wandb: a run must be begun; wandb says: No API key configured. "
        "Log in, or set WANDB_MODE=offline." in err
    )
