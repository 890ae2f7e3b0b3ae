"""One run of a sweep, in any process on any machine: lock, resume or begin, train, index."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gaf
from gaf_lab.data.run_data import RunData
from gaf_lab.own_code import own_place
from gaf_lab.records import run as records
from gaf_lab.records.locks import FolderBusy, file_lock, own_folder
from gaf_lab.records.score import ACCURACY
from gaf_lab.sweeps.jobs import Job, JobEnd, JobProgress, accuracies
from gaf_lab.training.listener import Listener
from gaf_lab.training.run import train_in_turns
from gaf_lab.training.turns import Turns, run_to_end

INDEX = "sweep.jsonl"  # beside the runs' folders


def work(job: Job, listener: Listener) -> JobEnd:
    """Finishes a run, from its checkpoint if it has one. An error is returned, not raised."""
    return run_to_end(work_in_turns(job, listener))


def work_in_turns(job: Job, listener: Listener) -> Turns[JobEnd]:
    """Does what `work` does, and yields to other runs of this process while the device computes."""
    try:
        with own_folder(job.folder, job.command):
            run = job.finished_run() or (yield from train_job(job, listener))
            add_to_index(job.folder.parent, [run])
    except FolderBusy:
        return JobEnd("busy")
    except Exception as error:
        return JobEnd("failed", f"{type(error).__name__}: {error}{own_place(error)}")
    return JobEnd("finished")


def train_job(job: Job, listener: Listener) -> Turns[records.Run]:
    resume = job.resumable
    if not resume:
        (job.folder / records.FILE).unlink(missing_ok=True)
    options: dict[str, Any] = {
        "resume": resume,
        "data_folder": job.data_folder,
        "keep_checkpoints": job.keep_checkpoints,
        "command": job.command,
    }
    return (yield from train_in_turns(job.config, job.folder, listener, **options))


class Reporter:
    """Follows a run, and reports its progress five times a second."""

    def __init__(self, report: Callable[[JobProgress], None]) -> None:
        self.report = report
        self.facts, self.score = "", ACCURACY
        self.steps = 1
        self.reported = 0.0

    def begin(self, problem: RunData, step: int, steps: int) -> None:
        self.steps, self.score = steps, problem.score
        self.report(JobProgress(step / steps, self.facts))

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        if time.perf_counter() - self.reported > 0.2:
            self.reported = time.perf_counter()
            self.report(JobProgress(step / self.steps, self.facts))

    def evaluated(self, line: dict[str, Any]) -> None:
        self.facts = accuracies(line, self.score)


def add_to_index(out: Path, runs: Iterable[records.Run]) -> None:
    """Adds a line for each finished run that has none, and completes a line that was cut off."""
    path = out / INDEX
    with file_lock(path), path.open("rb+") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        new = [index_line(run) for run in runs if index_start(run).encode() not in whole]
        if len(whole) < len(content):
            file.truncate(len(whole))
        file.seek(len(whole))
        file.write("".join(new).encode())


def index_start(run: records.Run) -> str:
    return f'{{"name": "{run.folder.name}", '


def index_line(run: records.Run) -> str:
    assert run.end is not None
    entry = {
        "name": run.folder.name,
        "arm": run.arm,
        "seed": run.seed,
        "hash": run.header["config_hash"],
        "test_last": run.score.of(run.evals[-1]),
        "test_selected": run.score.of(run.selected),
        "seconds": run.end["seconds"],
    }
    return json.dumps(entry) + "\n"
