"""Sweeps on a Ray cluster of several nodes on this machine: a node that is killed loses no run."""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from rich.console import Console
from test_sweep import BASE, assert_index_is_whole, assert_same_runs, subset

from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.locks import LOCK
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import folder_name
from gaf_lab.sweeps.sweep import sweep
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import wait_until

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.distributed

LONG = dataclasses.replace(BASE, passes=8.0)  # a checkpoint after each pass
PLAN = [LONG, dataclasses.replace(LONG, policy="mean", passes=2.0), subset(LONG)]
SOURCE = Path(__file__).parents[2] / "helpers" / "regression.py"


@pytest.fixture
def cluster(monkeypatch):
    """A head without cores for runs, so that these are on nodes that can be killed."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def holder(path):
    """The process that holds the lock on a file."""
    for line in Path("/proc/locks").read_text().splitlines():
        kind, _, _, pid, place = line.split(": ", 1)[1].split()[:5]
        if kind == "FLOCK" and int(place.split(":")[2]) == path.stat().st_ino:
            return int(pid)
    raise AssertionError(f"nobody holds {path}")


def ancestors(pid):
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def own_tasks(folder, monkeypatch):
    """A task by its file, and one by its module, which only the sweep's own process finds."""
    folder.mkdir()
    file = shutil.copy(SOURCE, folder / "plane_of_ray.py")
    monkeypatch.syspath_prepend(folder)
    own = TrainConfig(noise="none", k=2, b=10, passes=2.0, task=f"{file}:regression")
    return [own, dataclasses.replace(own, task="plane_of_ray:regression", task_source="")]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="finds a run's node in /proc")
def test_a_node_that_is_killed_loses_no_run(cluster, tmp_path, monkeypatch):
    nodes = {
        node.all_processes["raylet"][0].process.pid: node
        for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))
    }
    plan = [*PLAN, *own_tasks(tmp_path / "modules", monkeypatch)]
    folder, console = tmp_path / "cut" / folder_name(LONG), Console(file=io.StringIO())
    seen = []

    def kill():
        """As soon as the long run has a checkpoint, the node that it is on."""
        wait_until((folder / checkpoint.CHECKPOINT_FILE).exists)
        worker = holder(folder / LOCK)
        os.kill(worker, signal.SIGSTOP)  # or the run might end before its node
        (raylet,) = set(ancestors(worker)) & nodes.keys()
        cluster.remove_node(nodes[raylet], allow_graceful=False)
        seen.append(records.read(folder))
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    shared = {"engine": "ray", "address": cluster.address, "data_folder": None, "console": console}
    swept = sweep(plan, tmp_path / "cut", workers=len(plan), **shared)
    killer.join()
    assert not swept.failed
    assert f"{folder.name}: its node or process died (" in console.file.getvalue()
    assert seen[0].end is None
    assert swept.runs[0].header["started"] == seen[0].header["started"]  # not begun anew
    for config in plan:
        undisturbed = dataclasses.replace(
            config, replay=config.replay and tmp_path / "whole" / config.replay
        )
        train(undisturbed, tmp_path / "whole" / folder_name(config), Silent())
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert_index_is_whole(tmp_path / "cut")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_without_a_cluster_the_engine_says_how_to_start_one(tmp_path, address):
    with pytest.raises(
        ConfigError,
        match=f"address must be .*, auto or HOST:PORT; got '{address}' .*Start one with: ray start",
    ):
        sweep(
            PLAN,
            tmp_path,
            workers=1,
            engine="ray",
            address=address,
            data_folder=None,
            console=Console(quiet=True),
        )
