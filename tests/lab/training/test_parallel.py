"""Ranks end where one process ends, even if they are killed and started again.

A config that cannot run is refused once, and only rank 0 prints.

TOLERANCE: one process adds rows to a running sum as they come; ranks add slices of them after an
exchange (and for plain averaging, halves or rings of them). So float32 additions come in another
order: 1e-7 relative each, some tens of steps.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.distributed as dist

from gaf_lab.commands.train import under_torchrun
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.reading import from_dict
from gaf_lab.training.diverged import Diverged
from gaf_lab.training.engines import check_ranks
from gaf_lab.training.ranks import Group, here
from gaf_lab.training.resume import prepare_restart
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import assert_same, wait_until
from helpers.warm import WARM

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
WORLD = 3  # odd, so that slices are uneven and a ring adds in another order at each place
SMALL = TrainConfig(
    dataset="digits",
    model="mlp",
    k=WORLD,
    b=16,
    passes=1.0,
    eval_every=0.4,
    lr=0.02,
    tau=0.9,
    augment=True,
)
OWN = TrainConfig(
    task="helpers.regression:regression", noise="none", k=WORLD, b=10, passes=4.0, lr=0.02
)
# a task whose data differ from rank to rank, as those of numpy's global generator would
UNLIKE = """
import os
from helpers.regression import regression

def unlike(config):
    problem = regression(config)
    problem.train[1][0] += float(os.environ["LOCAL_RANK"])
    return problem
"""
TIMING = ("seconds", "samples_per_second")


@pytest.fixture
def torchrun():
    """Starts `torchrun -m gaf_lab train WORDS`; nothing of it outlives the test."""
    started = []
    yield lambda *args, **options: started.append(launch(*args, **options)) or started[-1]
    for process in started:
        process.terminate()
        process.communicate()


def launch(ranks, *words, options=(), out=subprocess.PIPE):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    pipes = {"stdout": out, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*launcher, "-m", "gaf_lab", "train", *map(str, words)], **pipes)


def words_of(config):
    """The command line of a config."""
    words = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if value != field.default:
            words += [name.replace("--", "--no-", 1) if value is False else name] + (
                [] if isinstance(value, bool) else [str(value)]
            )
    return words


def state_in(folder):
    return torch.load(folder / checkpoint.CHECKPOINT_FILE, weights_only=True)


def assert_close(a, b):
    """Weights within the tolerance; and what was decided at each step."""
    for part in ("model", "average"):
        found, expected = (state_in(folder)[part] or {} for folder in (a, b))
        for name in found:
            if "running" not in name and "tracked" not in name:
                x, y = found[name].double(), expected[name].double()
                assert (x - y).norm() <= TOLERANCE * x.norm(), f"{part}: {name}"
    assert records.read(a).rows == records.read(b).rows


def assert_same_run(a, b):
    first, second = (
        {
            key: value
            for key, value in state_in(folder).items()
            if key not in ("seconds", "records_size")
        }
        for folder in (a, b)
    )
    assert_same(first, second)
    for x, y in zip(records.read(a).evals, records.read(b).evals, strict=True):
        assert {k: v for k, v in x.items() if k not in TIMING} == {
            k: v for k, v in y.items() if k not in TIMING
        }


# -------------------------------------------------------------------------- jobs in ranks that stay


def jobs(folder):
    """name -> config and arguments of `train`, in the order in which they run.

    "early" and "one" end at a step and are resumed.
    """
    replay = {"replay": folder / "recorded"}
    nets = {
        "gaf": SMALL,
        "mean": dataclasses.replace(SMALL, policy="mean", optimizer="adam", lr=0.002),
    }
    return {
        "gaf": (nets["gaf"], {}),
        "best": (
            dataclasses.replace(
                SMALL, start="best", model="convnet", schedule="cosine", schedule_waits=True
            ),
            {},
        ),
        "mean": (nets["mean"], {}),
        "random-skip": (dataclasses.replace(SMALL, policy="random-skip", autocast="bfloat16"), {}),
        "replay-skip": (dataclasses.replace(SMALL, policy="replay-skip", **replay), {}),
        "random-subset": (dataclasses.replace(SMALL, policy="random-subset", **replay), {}),
        "plateau": (
            dataclasses.replace(SMALL, schedule="plateau", patience=0, eval_every=0.1, lr=0.3),
            {},
        ),
        "sam": (dataclasses.replace(SMALL, sam=0.05, model="convnet", limit=300), {}),
        "ema": (
            dataclasses.replace(
                SMALL, ema=0.9, mixup=0.4, early_stopping=1, eval_every=0.1, lr=0.1
            ),
            {},
        ),
        "early-gaf": (nets["gaf"], {"steps": 11}),
        "early-mean": (nets["mean"], {"steps": 11}),
        "one-gaf": (nets["gaf"], {"resume": True}),
        "long": (dataclasses.replace(SMALL, passes=6.0, eval_every=3.0), {}),
        "diverged": (dataclasses.replace(SMALL, policy="mean", momentum=0.0, lr=1e30), {}),
        "own": (OWN, {}),
        "unlike": (dataclasses.replace(OWN, task=f"{folder}/unlike.py:unlike", task_source=""), {}),
    }


def work(pipe, rank, store, folder):
    jaxtyping.config.update("jaxtyping_disable", True)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    group, told = here(), {}

    def attempt(name, job):
        try:
            told[name] = str(job())
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    for name, (config, options) in jobs(folder).items():
        attempt(
            name,
            lambda c=config, n=name, o=options: len(
                train(c, folder / n, Silent(), group=group, **o).rows
            ),
        )
        if name.startswith("early"):
            if rank == 0:
                shutil.copytree(folder / name, folder / f"alone-{name}")
            attempt(
                name,
                lambda c=config, n=name: len(
                    train(c, folder / n, Silent(), group=group, resume=True).rows
                ),
            )
    attempt("all", lambda: group.on_rank_0(lambda: {"rank": rank}))
    attempt("led", lambda: group.on_rank_0(lambda: 1 // rank))
    attempt("each", lambda: group.each(lambda: 1 // (rank - 1)))
    attempt("there", lambda: train(SMALL, folder / "gaf", Silent(), group=group))
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A folder with all jobs' runs by ranks, and what each rank was told."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "unlike.py").write_text(UNLIKE)
    train(SMALL, folder / "recorded", Silent())
    train(SMALL, folder / "one-gaf", Silent(), steps=11)
    store = str(folder / "store")
    processes = [WARM.start(work, rank, store, folder) for rank in range(WORLD)]
    assert [process.wait() for process in processes] == [0] * WORLD
    return folder, [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize(
    "name",
    ["gaf", "best", "mean", "random-skip", "replay-skip", "random-subset", "plateau", "sam", "ema"],
)
def test_ranks_take_the_decisions_and_end_with_the_weights_of_one_process(ranks, tmp_path, name):
    config = jobs(ranks[0])[name][0]
    # bfloat16 has 8 bits: a last bit of float32 can tip the rounding of an activation
    one = train(config, tmp_path / "one", Silent())
    if config.autocast == "none":
        assert_close(ranks[0] / name, tmp_path / "one")
    several = records.read(ranks[0] / name)
    assert several.rows == one.rows
    for a, b in zip(several.evals, one.evals, strict=True):
        for key in ("step", "steps_taken", "samples", "passes", "acceptance", "lr"):
            assert a[key] == b[key]
        assert a["train_loss"] == pytest.approx(
            b["train_loss"], rel=1e-2 if config.autocast != "none" else TOLERANCE
        )
        if name in ("gaf", "plateau"):
            for key in (
                "distance_mean",
                "distance_min",
                "heldout_loss",
                "test_loss",
                "test_accuracy",
            ):
                assert a[key] == pytest.approx(b[key], rel=10 * TOLERANCE)
    if name == "plateau":
        assert several.evals[-1]["lr"] < config.lr
    if name == "ema":
        # it stopped early, on all ranks
        assert len(several.rows) < len(records.read(ranks[0] / "gaf").rows)
    if name in ("gaf", "best"):
        # some steps are taken and some are skipped
        assert 0 < sum(n > 0 for n in one.rows) < len(one.rows)


def test_plain_averaging_by_ranks_looks_at_no_gradient_and_records_no_distances(ranks):
    for name in ("mean", "random-skip", "replay-skip"):
        for line in records.read(ranks[0] / name).evals:
            assert [
                line[key]
                for key in ("distance_mean", "distance_min", "noise_scale", "norm_dispersion")
            ] == [None] * 4


@pytest.mark.parametrize("name", ["gaf", "mean"])
def test_ranks_that_are_stopped_and_resumed_end_bit_for_bit_as_undisturbed_ones(ranks, name):
    assert_same_run(ranks[0] / name, ranks[0] / f"early-{name}")


@pytest.mark.parametrize("name", ["gaf", "mean"])
def test_one_process_goes_on_where_ranks_stopped(ranks, name):
    config, _ = jobs(ranks[0])[name]
    resumed = train(config, ranks[0] / f"alone-early-{name}", Silent(), resume=True)
    assert resumed.end["status"] == "finished"
    assert_close(ranks[0] / name, resumed.folder)


def test_ranks_go_on_where_one_process_stopped(ranks):
    assert_close(ranks[0] / "gaf", ranks[0] / "one-gaf")


def test_all_ranks_stop_together_where_the_loss_is_no_number_and_one_says_why(ranks, tmp_path):
    folder, told = ranks
    with pytest.raises(Diverged) as alone:
        train(jobs(folder)["diverged"][0], tmp_path, Silent())
    assert told[0]["diverged"] == f"Diverged: {alone.value}".replace(
        str(tmp_path), str(folder / "diverged")
    )
    assert [t["diverged"] for t in told[1:]] == ["Elsewhere: "] * 2
    assert records.read(folder / "diverged").end["status"] == "diverged"


def test_an_error_on_one_rank_is_raised_there_and_ends_the_others(ranks):
    told = ranks[1]
    zero = "ZeroDivisionError: integer division or modulo by zero"
    assert [t["led"] for t in told] == [zero, "Elsewhere: ", "Elsewhere: "]
    assert [t["each"] for t in told] == ["Elsewhere: ", zero, "Elsewhere: "]
    assert [t["all"] for t in told] == [str({"rank": 0})] * 3
    assert told[0]["there"].startswith("ConfigError: output folder")
    assert [t["there"] for t in told[1:]] == ["Elsewhere: "] * 2


def test_a_task_of_the_users_own_ends_where_one_process_ends(ranks, tmp_path):
    one = train(OWN, tmp_path, Silent())
    assert_close(ranks[0] / "own", tmp_path)
    for a, b in zip(records.read(ranks[0] / "own").evals, one.evals, strict=True):
        for key in ("train_loss", "heldout_loss", "test_loss", "distance_mean"):
            assert a[key] == pytest.approx(b[key], rel=10 * TOLERANCE)


def test_a_task_that_gives_the_ranks_different_data_is_refused(ranks):
    told = [each["unlike"] for each in ranks[1]]
    assert told[1].startswith(
        "ConfigError: training data: must be the same on all ranks; rank 1 has those of checksum"
    )
    assert (told[0], told[2]) == ("Elsewhere: ", "Elsewhere: ")


def test_every_rank_gets_the_run_that_rank_0_recorded(ranks):
    folder, told = ranks
    assert [t["gaf"] for t in told] == [str(len(records.read(folder / "gaf").rows))] * 3


# ---------------------------------------------------------------------------------- torchrun


def test_torchrun_with_four_ranks_is_one_run_and_equals_one_process(torchrun, tmp_path):
    config = dataclasses.replace(SMALL, k=4)
    process = torchrun(4, *words_of(config), "--out", tmp_path / "four")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    one = train(config, tmp_path / "one", Silent())
    assert_close(tmp_path / "four", tmp_path / "one")
    run = records.read(tmp_path / "four")
    kinds = [
        json.loads(line)["kind"]
        for line in (tmp_path / "four" / records.FILE).read_text().splitlines()
    ]
    assert kinds == ["run", *["eval"] * len(one.evals), "end"]
    assert (run.header["ranks"], run.end["status"]) == (4, "finished")
    assert from_dict(run.header["config"], TrainConfig(), "header") == config
    assert run.header["command"].startswith(
        "torchrun --nproc-per-node 4 -m gaf_lab train --dataset digits"
    )
    assert (
        out.count("held-out   test") == out.count("training samples") == out.count("Records: ") == 1
    )
    assert sum(
        line.split()[:2] == [f"{e['passes']:.2f}", str(e["step"])]
        for line in out.splitlines()
        for e in run.evals
    ) == len(run.evals)


FAILS_ON_RANK_1 = """
import os
import torch
from torch.nn import Linear
from gaf_lab import Problem

def task(config):
    part, calls = (torch.randn(200, 4), torch.randn(200)), []
    def loss(output, target):
        calls.append(0)
        if os.environ["RANK"] == "1" and len(calls) > 6:
            raise KeyError("rank 1")
        return (output[:, 0] - target) ** 2
    return Problem(model=Linear(4, 1), train=part, test=part, loss=loss)
"""


def test_one_rank_that_fails_alone_ends_them_all(torchrun, tmp_path):
    """The other one waits for it in an all-reduce, and would for half an hour."""
    (tmp_path / "own.py").write_text(FAILS_ON_RANK_1)
    own = ["--task", f"{tmp_path}/own.py:task", "--k", "2", "--b", "10", "--passes", "20"]
    process = torchrun(2, *own, "--device", "cpu", "--out", tmp_path / "run")
    _, err = process.communicate(timeout=120)
    assert process.returncode
    assert "KeyError: 'rank 1'" in err


def test_torchrun_takes_a_task_in_a_file_by_its_path_from_here(torchrun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parents[2] / "helpers" / "regression.py", "plane.py")
    own = ["--task", "plane.py:regression", "--k", "2", "--b", "10", "--lr", "0.02"]
    process = torchrun(2, *own, "--passes", "4", "--out", "two")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert out.startswith("plane.py:regression: 216 training samples")
    config = dataclasses.replace(OWN, task=f"{tmp_path}/plane.py:regression", task_source="", k=2)
    one = train(config, tmp_path / "one", Silent())
    assert_close(tmp_path / "two", tmp_path / "one")
    run = records.read(tmp_path / "two")
    assert run.header["config"]["task"] == config.task
    assert run.header["config"]["task_source"] == config.task_source
    assert run.evals[-1]["test_loss"] == pytest.approx(
        one.evals[-1]["test_loss"], rel=10 * TOLERANCE
    )


@pytest.mark.parametrize(
    ("mistake", "words", "message"),
    [
        (
            "k",
            ["--k", "4"],
            "k must be the number of ranks, because each computes one micro-batch; "
            "got k = 4 on 2 ranks. Start 4 of them ",
        ),
        ("folder", ["--k", "2"], "must not hold a run yet; it does. Go on with --resume"),
    ],
)
def test_what_cannot_run_is_refused_by_all_ranks_with_one_message(
    torchrun, tmp_path, mistake, words, message
):
    folder = tmp_path / "out"
    if mistake == "folder":
        train(dataclasses.replace(SMALL, k=2), folder, Silent(), steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    process = torchrun(2, "--dataset", "digits", *words, "--out", folder)
    out, err = process.communicate(timeout=900)
    assert process.returncode != 0
    assert (out + err).count(message) == (out + err).count("gaf train:") == 1
    assert "exitcode  : 2 " in err  # torchrun's own table
    assert "exitcode  : 1 " not in err
    assert (
        "Traceback" not in err.split("torch/distributed/run.py")[0].split("failed (exitcode: 2)")[0]
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def children(pid):
    """Processes that a process has started, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.slow  # on a busy machine a kill can come too late
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_kill_minus_9_of_a_worker_brings_the_run_back_and_to_the_same_end(
    ranks, torchrun, tmp_path
):
    config, _ = jobs(ranks[0])["long"]
    words = [*words_of(config), "--out", tmp_path / "cut"]
    printed = tmp_path / "out.txt"
    with printed.open("w") as out:
        process = torchrun(WORLD, *words, options=["--max-restarts", "2"], out=out)
    before, kept = [], tmp_path / "cut" / checkpoint.CHECKPOINT_FILE

    def begun():
        # the records begin before this line is printed: the kill must not come between
        return "training samples" in printed.read_text()

    def evaluated():
        return kept.exists() and torch.load(kept, weights_only=True)["step"] > 0

    # before the first evaluation, and after it; a follower, and rank 0
    for far_enough, victim in ((begun, 1), (evaluated, 0)):
        wait_until(
            lambda far_enough=far_enough, old=before: (
                far_enough()
                and len(children(process.pid)) == WORLD
                and children(process.pid) != old
            )
        )
        before = children(process.pid)
        os.kill(before[victim], signal.SIGKILL)
        wait_until(lambda old=before: children(process.pid) != old)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    out = printed.read_text()
    assert out.count("training samples") == 3
    assert " ".join(out.split()).count("162 steps, from step 81 ") == 1
    assert_same_run(ranks[0] / "long", tmp_path / "cut")
    kinds = [
        json.loads(line)["kind"]
        for line in (tmp_path / "cut" / records.FILE).read_text().splitlines()
    ]
    assert kinds == ["run", "eval", "eval", "end"]


# ---------------------------------------------------------------------------------- one process


def test_batch_norm_statistics_of_accepted_micro_batches_alone_are_refused_on_ranks():
    config = dataclasses.replace(SMALL, bn="accepted")
    with pytest.raises(
        ConfigError,
        match="bn must be 'all' on several ranks, .*; got 'accepted' on 3 ranks. "
        "Set --bn all, or run one",
    ):
        check_ranks(config, WORLD)
    check_ranks(config, 1)
    check_ranks(dataclasses.replace(config, k=8), 1)


def test_only_the_torchrun_that_began_a_run_starts_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    train(SMALL, tmp_path, Silent(), steps=5)
    assert prepare_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert not prepare_restart(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not prepare_restart(tmp_path)
    assert not prepare_restart(tmp_path / "absent")
    assert (tmp_path / records.FILE).exists()


def test_a_run_without_a_checkpoint_is_started_anew_by_its_own_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    train(SMALL, tmp_path, Silent(), steps=5, keep_checkpoints=False)
    assert not prepare_restart(tmp_path)
    assert not (tmp_path / records.FILE).exists()


def test_torchrun_with_one_process_is_one_process(monkeypatch):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    assert not under_torchrun()
    assert here() == Group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert under_torchrun()
    monkeypatch.delenv("MASTER_ADDR")  # another launcher's variables
    assert not under_torchrun()
