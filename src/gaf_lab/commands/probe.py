"""`gaf probe`: micro-gradients measured without a step, and the tau that they recommend."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from gaf_lab.commands.common import Words, base_config, say
from gaf_lab.settings.config import TrainConfig


@dataclass
class ProbeOptions:
    """Measures micro-gradients without stepping: distances, noise scale, what each tau accepts."""

    config: OmitArgPrefixes[TrainConfig]
    out: Path = Path("runs/probe")
    """Folder for probe.jsonl and probe.png."""
    preset: str | None = None
    """A config by name; `gaf presets` lists them."""
    toml: Path | None = None
    """A TOML file with config keys."""
    data: Path | None = None
    """Folder with the data set's archive or its unpacked folder.
    Without it, the data set is downloaded. With --task: the file or folder that it reads."""
    after: tuple[int, ...] = (0, 100)
    """Steps of training, with the config's own policy and tau, before each measurement.
    0: the initial weights, which agree most."""
    rows: int = 128
    """Micro-gradients in a measurement, at least 8 and twice k.
    Higher is more exact and costs time and memory."""
    slices: int = 1
    """Parts that the gradient is measured in.
    Higher divides the memory and multiplies the time by it."""
    share: float = 0.5
    """Largest share of the compared micro-gradients that the recommended tau accepts, in (0, 1).
    Lower filters more."""
    chance: float = 0.05
    """Largest chance of pure noise to pass a comparison under the recommended tau, in (0, 1).
    Lower filters more."""


def run_probe(words: Words, console: Console) -> int:
    default = ProbeOptions(base_config(words))
    options = tyro.cli(ProbeOptions, prog="gaf probe", args=words, default=default)
    from gaf_lab.records.locks import own_folder

    command = f"gaf probe {shlex.join(words)}"
    with own_folder(options.out, command):
        return probe_and_write(options, command, console)


def probe_and_write(options: ProbeOptions, command: str, console: Console) -> int:
    from gaf_lab.experiments.probe import probe_training
    from gaf_lab.experiments.probe_figure import draw_probe
    from gaf_lab.experiments.probe_report import layer_table, recommendation, table, verdicts
    from gaf_lab.records.measurements import write_measurements
    from gaf_lab.training.console import Progress, describe_data, describe_training
    from gaf_lab.training.make import pick_device

    config = options.config
    sizes = (options.rows, options.slices, options.share, options.chance)
    say(console, f"{describe_data(config)}; {describe_training(config)}")
    with Progress(console) as progress:
        found = list(probe_training(config, options.after, options.data, *sizes, progress))
    lines = [one.line() for one in found]
    console.print(table(lines))
    console.print(layer_table([line for line in lines if line["layers"]][-1]))
    for verdict in verdicts(lines):
        say(console, verdict)
    conditions = {
        "command": command,
        "config": config.plain(),
        "share": options.share,
        "chance": options.chance,
    }
    write_measurements(found, options.out / "probe.jsonl", conditions, pick_device(config.device))
    draw_probe(lines, options.out / "probe.png")
    say(console, f"Figures: {options.out / 'probe.jsonl'}, {options.out / 'probe.png'}")
    say(console, recommendation(lines))
    return 0
