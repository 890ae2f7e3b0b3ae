"""`gaf train`: one run, in one process or among those that torchrun started."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from gaf_lab.commands.common import Words, base_config, say
from gaf_lab.commands.without_effect import refuse_without_effect
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig

if TYPE_CHECKING:
    from gaf_lab.training.ranks import Group


@dataclass
class TrainOptions:
    """Trains one run. Options: the defaults, then --preset, --toml, and the command line."""

    config: OmitArgPrefixes[TrainConfig]
    out: Path = Path("runs/train")
    """Folder for records and checkpoint."""
    preset: str | None = None
    """A config by name; `gaf presets` lists them."""
    toml: Path | None = None
    """A TOML file with config keys."""
    data: Path | None = None
    """Folder with the data set's archive or its unpacked folder.
    Without it, the data set is downloaded. With --task: the file or folder that it reads."""
    steps: int | None = None
    """Ends the run at this step."""
    resume: bool = False
    """Resumes from the checkpoint in --out, to the same result as an uninterrupted run."""
    tracker: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also sends every evaluation's numbers there.
    They go to tensorboard/ or wandb/ in --out, or to trackio's own folder."""
    tensorboard: bool = False
    """Short for --tracker tensorboard."""


def run_train(words: Words, console: Console) -> int:
    options = parse_on_rank_0(words) if under_torchrun() else parse_train(words)
    if isinstance(options, int):
        return options
    from gaf_lab.training import ranks, trackers
    from gaf_lab.training.console import ConsoleListener
    from gaf_lab.training.listener import Listeners
    from gaf_lab.training.run import train

    group = ranks.here()
    resume, done = group.on_rank_0(lambda: check_before_start(options, group))
    if done is not None:
        say(console, f"{options.out}: the run is complete ({done} steps); nothing to do.")
        return 0
    listener, boards = ConsoleListener(console), []
    if group.leads:
        boards = [trackers.TrackerListener(name, options.out) for name in tracker_names(options)]
    start = "gaf train "
    if group.world > 1:
        start = f"torchrun --nproc-per-node {group.world} -m gaf_lab train "
    try:
        run = train(
            options.config,
            options.out,
            Listeners(listener, *boards),
            data_folder=options.data,
            steps=options.steps,
            resume=resume,
            command=start + shlex.join(words),
            group=group,
        )
    except KeyboardInterrupt:
        again = shlex.join(words_to_resume(words, options.out))
        say(console, f"\nStopped. Go on with: {start}{again}")
        return 130
    finally:
        listener.close()
        for board in boards:
            board.close()
    for line in run.evals[-1:]:
        if not line.get("restarted", True):
            say(
                console,
                f"The audit found too little to start again: separation {line['separation']:.3f}, "
                "where 0.7 is needed. Few labels are wrong, or the features are too weak to tell. "
                "The run went on as averaging.",
            )
    say(console, f"Records: {options.out / 'records.jsonl'}. Page: gaf report {options.out}")
    return 0


def words_to_resume(words: Words, out: Path) -> Words:
    """The words that resume a stopped run, or begin it if it was stopped while it read its data."""
    again = [word for word in words if word != "--resume"]
    if (out / records.FILE).is_file():
        again.append("--resume")
    return again


def parse_train(words: Words) -> TrainOptions:
    default = TrainOptions(base_config(words))
    options = tyro.cli(TrainOptions, prog="gaf train", args=words, default=default)
    refuse_without_effect(words, options.config)
    if options.steps is not None and options.steps < 1:
        raise ConfigError(
            f"steps must be at least 1; got {options.steps}. Leave it out to run all passes."
        )
    return options


def parse_on_rank_0(words: Words) -> TrainOptions | int:
    """Rank 0's options for all ranks; the exit code if the parser ended the program."""
    from gaf_lab.training import ranks

    def parse() -> TrainOptions | int:
        try:
            return parse_train(words)
        except SystemExit as stop:
            return int(stop.code or 0)

    return ranks.here().on_rank_0(parse)


def check_before_start(options: TrainOptions, group: "Group") -> tuple[bool, str | None]:
    """Refuses what cannot run, and then makes the output folder.

    Returns:
        Whether to resume, and the number of steps if the run is complete.
    """
    from gaf_lab.records.locks import check_free
    from gaf_lab.training import trackers
    from gaf_lab.training.resume import check_output_folder, prepare_restart
    from gaf_lab.training.run import check_config

    check_config(options.config, group)
    trackers.check_installed(tracker_names(options))
    check_free(options.out)
    resume = options.resume or prepare_restart(options.out)
    done = check_output_folder(options.config, options.out, resume)
    return resume, None if done is None else f"{done.evals[-1]['step']:,}"


def tracker_names(options: TrainOptions) -> list[str]:
    """The trackers of a run, each once."""
    names = [*options.tracker]
    if options.tensorboard:
        names.append("tensorboard")
    return list(dict.fromkeys(names))


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1
