"""`gaf audit`: the training labels that look wrong, from one training."""

import dataclasses
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from gaf_lab.commands.common import Words, base_config, say, show_file
from gaf_lab.commands.without_effect import refuse_without_effect
from gaf_lab.settings.checks import MOST_SEEDS, check_count
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import AUDIT


@dataclass
class AuditOptions:
    """Lists the training labels that look wrong, from one training, with a sheet of pictures."""

    config: OmitArgPrefixes[TrainConfig]
    out: Path = Path("runs/audit")
    """Folder for samples.csv, suspects.png, audit.png and audit.jsonl."""
    preset: str | None = None
    """A config by name; `gaf presets` lists them."""
    toml: Path | None = None
    """A TOML file with config keys."""
    data: Path | None = None
    """Folder with the data set's archive or its unpacked folder.
    Without it, the data set is downloaded. With --task: the file or folder that it reads."""
    seeds: int = 1
    """Paired seeds, at least 1, starting at the config's own.
    samples.csv and the pictures are from the first seed."""


def run_audit(words: Words, console: Console) -> int:
    default = AuditOptions(base_config(words, AUDIT))
    options = tyro.cli(AuditOptions, prog="gaf audit", args=words, default=default)
    refuse_without_effect(words, options.config)
    from gaf_lab.records.locks import own_folder

    check_count("seeds", options.seeds, 1, MOST_SEEDS)
    command = f"gaf audit {shlex.join(words)}"
    with own_folder(options.out, command):
        return audit_and_write(options, command, console)


def audit_and_write(options: AuditOptions, command: str, console: Console) -> int:
    from gaf_lab.experiments.audit import audit_labels
    from gaf_lab.experiments.audit_figures import SUSPECTS, draw_audit, draw_suspects
    from gaf_lab.experiments.audit_report import (
        closing_words,
        first_suspects,
        table,
        with_truth,
        write_samples,
    )
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress, describe_data, describe_training
    from gaf_lab.training.make import pick_device

    config, out = options.config, options.out
    say(console, f"{describe_data(config)}; {describe_training(config)}")
    found = []
    with Progress(console) as progress:
        for seed in range(config.seed, config.seed + options.seeds):
            tell = partial(progress, f"seed {seed}")
            found.append(audit_labels(dataclasses.replace(config, seed=seed), options.data, tell))
    lines = [one.line() for one in found]
    write_samples(found[0], out / "samples.csv")
    draw_audit(found[0], out / "audit.png")
    sheet = draw_suspects(found[0], out / "suspects.png")
    if not sheet:  # of an earlier audit of pictures, to which these lines do not belong
        (out / "suspects.png").unlink(missing_ok=True)
    conditions = {"command": command, "config": config.plain()}
    write_measurements(found, out / "audit.jsonl", conditions, pick_device(config.device))
    if known := with_truth(lines):
        console.print(table(known))
    if (suspects := first_suspects(found[0])) is not None:
        console.print(suspects)
    say(console, closing_words(lines))
    say(console, f"Samples: {out / 'samples.csv'}. Figure: {out / 'audit.png'}")
    if sheet:
        show_file(console, f"The {SUSPECTS} first as pictures:", out / "suspects.png")
    return 0
