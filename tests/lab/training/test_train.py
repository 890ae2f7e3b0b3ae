"""Runs that are killed and resumed end the same; records report what happened.

A run that cannot go on reports why, and loses nothing.
"""

import dataclasses
import errno
import json
import resource
import time
from pathlib import Path

import pytest
import torch

from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.checkpoint import CheckpointError
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training import run as module
from gaf_lab.training.diverged import Diverged
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state
from helpers.warm import WARM

SMALL = TrainConfig(
    dataset="digits",
    model="convnet",
    k=4,
    b=16,
    passes=4.0,
    eval_every=1.0,
    lr=0.02,
    schedule="cosine",
)


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "gaf", "tau": 0.9, "augment": True, "bn": "accepted", "schedule_waits": True},
        {
            "policy": "random-skip",
            "optimizer": "adamw",
            "lr": 0.002,
            "schedule": "plateau",
            "patience": 0,
        },
        {
            "policy": "gaf",
            "start": "best",
            "optimizer": "rmsprop",
            "lr": 0.001,
            "schedule": "multi-step",
            "sampler": "stratified-observed",
            "b": 20,
            "noise": "asymmetric",
            "noise_rate": 0.2,
        },
        {
            "policy": "mean",
            "optimizer": "adam",
            "lr": 0.001,
            "model": "mlp",
            "nesterov": True,
            "autocast": "bfloat16",
        },
    ],
)
def test_an_interrupted_run_that_is_resumed_ends_bit_for_bit_as_an_undisturbed_one(
    tmp_path, changes
):
    config = dataclasses.replace(SMALL, **changes)
    whole = train(config, tmp_path / "whole", Silent())
    steps = whole.evals[-1]["step"]
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", Stop(after=steps // 2 + 1))
    assert records.read(tmp_path / "cut").end["status"] == "interrupted"
    resumed = train(config, tmp_path / "cut", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    timing = ("seconds", "samples_per_second")
    for a, b in zip(whole.evals, resumed.evals, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }


def far_enough(folder, size):
    """Whether a run has a checkpoint, and more than `size` bytes of records."""
    path = folder / records.FILE
    written = path.exists() and path.stat().st_size > size
    return written and (folder / checkpoint.CHECKPOINT_FILE).exists()


def test_kill_minus_9_at_any_moment_and_resume_gives_the_same_final_weights(tmp_path):
    words = [
        "train",
        "--dataset",
        "digits",
        "--model",
        "convnet",
        "--k",
        "4",
        "--b",
        "16",
        "--passes",
        "8",
        "--eval-every",
        "0.5",
        "--limit",
        "600",
    ]

    def start(folder, *options):
        said = tmp_path / f"said-{folder.name}"
        return WARM.start_program("-m", "gaf_lab", *words, "--out", folder, *options, out=said)

    whole, cut, kills = start(tmp_path / "whole"), tmp_path / "cut", 0
    assert whole.finish()
    assert whole.returncode == 0, whole.text()
    for size in (600, 6000):  # bytes of records: after the header, and after some evaluations
        resume = ["--resume"] if (cut / checkpoint.CHECKPOINT_FILE).exists() else []
        process = start(cut, *resume)
        while process.poll() is None and not far_enough(cut, size):
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 2
    assert records.read(cut).end is None
    process = start(cut, "--resume")
    assert process.wait() == 0, process.text()
    assert_same(final_state(tmp_path / "whole"), final_state(cut))


def test_steps_ends_a_run_early_and_resuming_without_it_finishes_as_if_it_had_not(tmp_path):
    config = dataclasses.replace(SMALL, schedule="plateau", patience=0)
    train(config, tmp_path / "whole", Silent())
    early = train(config, tmp_path / "early", Silent(), steps=27)
    assert (early.end["status"], early.evals[-1]["step"]) == ("stopped", 27)
    train(config, tmp_path / "early", Silent(), resume=True)
    # telemetry and weights alike; the additional evaluation at step 27 must have moved nothing
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "early"))


def test_records_count_every_step_and_agree_with_themselves(tmp_path):
    run = train(dataclasses.replace(SMALL, tau=0.9), tmp_path, Silent())
    last, config = run.evals[-1], run.header["config"]
    assert len(run.rows) == last["step"]
    assert sum(n > 0 for n in run.rows) == last["steps_taken"]
    # both kinds occur, so the counts above say something
    assert 0 < last["steps_taken"] < last["step"]
    assert all(n == 0 or 2 <= n <= 4 for n in run.rows)
    assert last["samples"] == last["step"] * config["k"] * config["b"]
    for line in run.evals:
        assert line["acceptance"] == pytest.approx(sum(line["rows"]) / (len(line["rows"]) * 4))
        assert 0 <= line["memorised"] + line["corrected"] <= 1
    assert run.header["config_hash"] == dataclasses.replace(SMALL, tau=0.9).hash
    assert run.end["status"] == "finished"
    assert run.header["versions"]["torch"] == torch.__version__


def test_paired_arms_see_the_same_labels_weights_and_micro_batches():
    arms = [
        module.Training(dataclasses.replace(SMALL, policy=policy), None)
        for policy in ("mean", "gaf")
    ]
    a, b = (t.problem for t in arms)
    assert torch.equal(a.train.observed, b.train.observed)
    assert torch.equal(a.heldout.x, b.heldout.x)
    for p, q in zip(arms[0].model.parameters(), arms[1].model.parameters(), strict=True):
        assert torch.equal(p, q)
    for step, i in ((0, 0), (5, 3), (0, 0)):
        assert torch.equal(a.micro_batch(step, i)[0], b.micro_batch(step, i)[0])


def test_training_and_held_out_samples_share_nothing_and_the_test_set_is_clean():
    problem = module.Training(SMALL, None).problem
    assert len(problem.train) + len(problem.heldout) == len(problem.problem.train[0])
    together = torch.cat([problem.train.x, problem.heldout.x]).flatten(1)
    assert torch.equal(
        torch.unique(together, dim=0), torch.unique(problem.problem.train[0].flatten(1), dim=0)
    )
    assert torch.equal(problem.test.observed, problem.test.clean)
    flipped = torch.cat(
        [
            problem.train.observed != problem.train.clean,
            problem.heldout.observed != problem.heldout.clean,
        ]
    )
    assert int(flipped.sum()) == int(0.4 * len(flipped))


def test_replay_arms_take_the_recorded_steps(tmp_path):
    config = dataclasses.replace(SMALL, tau=0.9)
    gaf_run = train(config, tmp_path / "gaf", Silent())
    skip = train(
        dataclasses.replace(config, policy="replay-skip", replay=tmp_path / "gaf"),
        tmp_path / "skip",
        Silent(),
    )
    subset = train(
        dataclasses.replace(config, policy="random-subset", replay=tmp_path / "gaf"),
        tmp_path / "subset",
        Silent(),
    )
    assert [4 * (n > 0) for n in gaf_run.rows] == skip.rows
    assert gaf_run.rows == subset.rows
    with pytest.raises(
        ConfigError, match="the recorded run must have the same k; it has 4, this one 3"
    ):
        train(
            dataclasses.replace(config, policy="replay-skip", replay=tmp_path / "gaf", k=3),
            tmp_path / "other",
            Silent(),
        )


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    config = dataclasses.replace(
        SMALL, model="mlp", policy="mean", lr=0.05, momentum=0.0, schedule="constant"
    )

    class Break(Silent):
        def evaluated(self, line):
            if line["passes"] > 1.5:
                with torch.no_grad():
                    next(training.model.parameters()).fill_(float("nan"))

    original = module.Training

    def remember(*args):
        nonlocal training
        training = original(*args)
        return training

    training = None
    module.Training = remember
    try:
        with pytest.raises(
            Diverged,
            match="all 4 micro-batches gave NaN or infinity. "
            f"The last good checkpoint is {tmp_path / checkpoint.CHECKPOINT_FILE}",
        ):
            train(config, tmp_path, Break())
    finally:
        module.Training = original
    assert records.read(tmp_path).end["status"] == "diverged"
    kept = torch.load(tmp_path / checkpoint.CHECKPOINT_FILE, weights_only=True)["model"]
    assert all(bool(t.isfinite().all()) for t in kept.values())


def test_a_corrupted_checkpoint_is_refused(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=25)
    path = tmp_path / checkpoint.CHECKPOINT_FILE
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"nonsense" * 100):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="must be whole; it cannot be read"):
            train(SMALL, tmp_path, Silent(), resume=True)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=25)
    mark = tmp_path / "executed"
    torch.save(
        {"config_hash": SMALL.hash, "model": Evil(mark)}, tmp_path / checkpoint.CHECKPOINT_FILE
    )
    with pytest.raises(CheckpointError, match="must be whole; it cannot be read"):
        train(SMALL, tmp_path, Silent(), resume=True)
    assert not mark.exists()


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=25)
    other = dataclasses.replace(SMALL, tau=0.5, policy="mean")
    with pytest.raises(
        CheckpointError,
        match="must be of the same config; policy: 'gaf' there, 'mean' here, "
        "tau: 0.8 there, 0.5 here. Resume",
    ):
        train(other, tmp_path, Silent(), resume=True)
    # 4 and 4.0 hash differently
    with pytest.raises(CheckpointError, match="same config; passes: 4.0 there, 4 here. Resume"):
        train(dataclasses.replace(SMALL, passes=4), tmp_path, Silent(), resume=True)


def test_a_checkpoint_whose_config_is_not_in_the_records_is_refused_by_its_hash(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=25)
    path, other = tmp_path / records.FILE, dataclasses.replace(SMALL, tau=0.5)
    path.write_text(path.read_text().replace(SMALL.hash, "0" * 12))
    with pytest.raises(
        CheckpointError,
        match=f"must be of the same config; it has hash {SMALL.hash}, "
        f"this config {other.hash}. Resume",
    ):
        train(other, tmp_path, Silent(), resume=True)


def test_resuming_without_a_checkpoint_is_refused_and_leaves_no_folder(tmp_path):
    with pytest.raises(
        CheckpointError, match="must exist to resume; it does not. Start the run without --resume.$"
    ):
        train(SMALL, tmp_path / "absent", Silent(), resume=True)
    assert not (tmp_path / "absent").exists()
    train(SMALL, tmp_path, Silent(), steps=5, keep_checkpoints=False)
    with pytest.raises(
        CheckpointError, match="it does not. Start the run without --resume, in another folder.$"
    ):
        train(SMALL, tmp_path, Silent(), resume=True)


def test_a_finished_run_is_not_run_again(tmp_path):
    whole = train(SMALL, tmp_path, Silent())
    before = (tmp_path / records.FILE).read_bytes()
    assert train(SMALL, tmp_path, Silent(), resume=True) == whole
    assert (tmp_path / records.FILE).read_bytes() == before


def test_a_run_killed_before_its_end_line_gets_it_when_resumed(tmp_path):
    whole = train(SMALL, tmp_path, Silent())
    path = tmp_path / records.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert train(SMALL, tmp_path, Silent(), resume=True).evals == whole.evals
    assert records.read(tmp_path).end["status"] == "finished"


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path):
    checkpoint.save(tmp_path, {"config_hash": "a", "x": torch.zeros(10)})
    before = (tmp_path / checkpoint.CHECKPOINT_FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # writes beyond fail, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError,
            match="must be written .* The checkpoint before it is whole: "
            "resume from it with --resume",
        ):
            checkpoint.save(tmp_path, {"config_hash": "a", "x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / checkpoint.CHECKPOINT_FILE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.CHECKPOINT_FILE]


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(
        ConfigError,
        match=rf"{file}/run: must be writable; it is not \({file}/run: Not a directory\). "
        "Give another one with",
    ):
        train(SMALL, file / "run", Silent())
    with pytest.raises(
        ConfigError,
        match=f"output folder {file}: must be a folder; it is a file. Give another one with --out.",
    ):
        train(SMALL, file, Silent())


def test_an_output_folder_under_a_root_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    # as on a read-only disk, which root cannot make with permissions
    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", "/nowhere")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ConfigError,
        match=r"^output folder /nowhere/x: must be writable; "
        r"it is not \(/nowhere: Read-only file system\). Give",
    ):
        train(SMALL, Path("/nowhere/x"), Silent())


def test_an_output_folder_with_a_run_in_it_is_not_overwritten(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=5)
    before = (tmp_path / records.FILE).read_text()
    with pytest.raises(ConfigError, match="must not hold a run yet; it does. Go on with --resume"):
        train(SMALL, tmp_path, Silent())
    assert (tmp_path / records.FILE).read_text() == before


def test_a_record_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=45)
    path = tmp_path / records.FILE
    whole = records.read(tmp_path)
    with path.open("a") as file:
        file.write('{"kind": "eval", "step": ')
    assert records.read(tmp_path) == whole
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 must be JSON"):
        records.read(tmp_path)


def test_records_appear_with_their_header_for_those_who_read_while_a_run_begins(
    tmp_path, monkeypatch
):
    seen, replace = [], Path.replace

    def look_first(part, target):
        if target == tmp_path / records.FILE:
            seen.append((target.exists(), json.loads(part.read_text())))
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", look_first)
    run = train(SMALL, tmp_path, Silent(), steps=1)
    assert seen == [(False, run.header)]
    assert sorted(path.name for path in tmp_path.glob(".part*")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line must be a header of kind 'run'; the file is empty"),
        (b"[]\n", "line 1 must be a record with a kind; it is not. Was the file edited?"),
        (b'{"kind": "run"}\n5\n', "line 2 must be a record with a kind"),
        (b'{"kind": "run"}\n{}\n', "line 2 must be a record with a kind"),
        (b'{"kind": "run"}\n\xff\xfe\n{}\n', "line 2 must be JSON"),
        (b'{"kind": "eval"}\n', "the first line must be a header of kind 'run'; it is not"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_nothing_else_is_raised(tmp_path, content, message):
    (tmp_path / records.FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / records.FILE}: {message}"):
        records.read(tmp_path)


def test_records_that_are_shorter_than_the_checkpoint_says_are_not_filled_up(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=45)
    path = tmp_path / records.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="bytes that the checkpoint goes on from; it has"):
        train(SMALL, tmp_path, Silent(), resume=True)
    assert path.read_bytes().startswith(whole[: len(whole) // 2])
    assert b"\0" not in path.read_bytes()


def test_records_hold_no_nan(tmp_path):
    records.append(
        tmp_path,
        {"kind": "run", "a": float("nan"), "b": [1.0, float("inf")], "c": Path("x"), "d": True},
    )
    assert json.loads((tmp_path / records.FILE).read_text()) == {
        "kind": "run",
        "a": None,
        "b": [1.0, None],
        "c": "x",
        "d": True,
    }
