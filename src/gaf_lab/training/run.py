"""One training run on disk: from a config to records in a folder.

The k micro-batches of a step are computed by one process in turn, or by k ranks at once
(`gaf_lab.training.ranks`); rank 0 evaluates and writes. Steps are taken one by one
(`gaf_lab.training.plain_engine`), or launched many at a time (`gaf_lab.training.device_engine`).
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from gaf_lab.data.read_ahead import worker_died
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.records.locks import check_free, own_folder
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.diverged import Diverged
from gaf_lab.training.engines import check_device_engine, check_ranks
from gaf_lab.training.listener import Listener
from gaf_lab.training.loop import Training
from gaf_lab.training.ranks import ALONE, Group
from gaf_lab.training.resume import (
    begin_records,
    check_output_folder,
    go_on,
    never_began,
    prepare_folder,
)
from gaf_lab.training.turns import Turns, run_to_end


def train(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    *,
    data_folder: Path | None = None,
    steps: int | None = None,
    resume: bool = False,
    keep_checkpoints: bool = True,
    command: str | None = None,
    group: Group = ALONE,
) -> records.Run:
    """Runs a config in `folder`; see `gaf_lab.records.run` for the files that it writes there.

    Args:
        config: what to run.
        folder: made if it is missing; must not hold another run unless `resume`.
        listener: receives every step and evaluation.
        data_folder: holds the data set's archive or files; None downloads it.
        steps: ends the run early, at this step.
        resume: go on from the folder's checkpoint; a finished run stays as it is.
        keep_checkpoints: write one at each evaluation.
        command: recorded, so that a reader can run it again.
        group: the ranks that call this, all with the same arguments. Only rank 0 reads and writes
            the folder, and only its listener receives evaluations.

    Raises:
        ConfigError, CheckpointError, DataError, OSError: if an argument cannot be used.
        Diverged: if the loss is no longer a number; the message names the last good checkpoint.
        Elsewhere: on the other ranks, if one raised one of these.
    """
    options: dict[str, Any] = {
        "data_folder": data_folder,
        "steps": steps,
        "resume": resume,
        "keep_checkpoints": keep_checkpoints,
    }
    with contextlib.ExitStack() as claims:
        group.on_rank_0(lambda: claim(config, folder, resume, command, group, claims))
        return run_to_end(
            train_in_turns(config, folder, listener, **options, command=command, group=group)
        )


def train_in_turns(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    *,
    data_folder: Path | None = None,
    steps: int | None = None,
    resume: bool = False,
    keep_checkpoints: bool = True,
    command: str | None = None,
    group: Group = ALONE,
) -> Turns[records.Run]:
    """`train`, giving way to other runs while the device works on launched steps.

    See `gaf_lab.training.together`. The caller keeps other runs out of the folder
    (`gaf_lab.records.locks.own_folder`).
    """
    state, done = group.on_rank_0(lambda: prepare_start(config, folder, resume, group))
    if done is not None:
        return done
    training = Training(config, data_folder, group)
    if state is not None:
        go_on(training, state)
    first = partial(training.state_dict, folder) if keep_checkpoints else None
    group.on_rank_0(
        lambda: begin_records(config, folder, training.problem, command, state, group, first)
    )
    status = "interrupted"
    try:
        status = yield from training.run(folder, listener, steps, keep_checkpoints)
    except Diverged as error:
        status = "diverged"
        kept = describe_checkpoint(folder / checkpoint.CHECKPOINT_FILE)
        raise Diverged(f"{error} {kept} A lower learning rate is the usual way out.") from None
    except RuntimeError as error:
        raise worker_died(error) from None
    finally:
        if group.leads:
            seconds = training.seconds + training.interval.seconds
            with contextlib.suppress(OSError):  # a full disk: the first error says more
                records.append(folder, {"kind": "end", "status": status, "seconds": seconds})
    return group.on_rank_0(lambda: records.read(folder))


def claim(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    command: str | None,
    group: Group,
    claims: contextlib.ExitStack,
) -> None:
    """Keeps other runs out of the folder while `claims` is open.

    A config that cannot run leaves no folder behind.
    """
    check_config(config, group)
    check_free(folder)
    prepare_folder(folder, resume)
    claims.enter_context(own_folder(folder, command))


def check_config(config: TrainConfig, group: Group) -> None:
    check_ranks(config, group.world)
    check_device_engine(config, group.world)


def prepare_start(
    config: TrainConfig, folder: Path, resume: bool, group: Group
) -> tuple[dict[str, Any] | None, records.Run | None]:
    """Refuses a folder that the config cannot run in; removes records without an evaluation.

    Returns:
        the checkpoint to go on from, if any; the run, if it is finished.
    """
    check_config(config, group)
    done = check_output_folder(config, folder, resume)
    if never_began(folder):
        (folder / records.FILE).unlink()
        return None, None
    if resume and done is None:
        return checkpoint.load(folder, config), None
    return None, done


def describe_checkpoint(path: Path) -> str:
    if path.is_file():
        return f"The last good checkpoint is {path}."
    return "There was no checkpoint yet."
