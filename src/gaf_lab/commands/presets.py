"""`gaf presets`: the configs that have a name."""

from dataclasses import dataclass

import tyro
from rich.console import Console

from gaf_lab.commands.common import Words, say
from gaf_lab.settings.presets import PRESETS


@dataclass
class PresetsOptions:
    """Lists the configs that have a name."""


def run_presets(words: Words, console: Console) -> int:
    tyro.cli(PresetsOptions, prog="gaf presets", args=words)
    for name, c in PRESETS.items():
        sizes = f"k {c.k}, b {c.b}, noise {c.noise} {c.noise_rate:g}"
        if c.policy == "gaf":
            sizes += f", tau {c.tau:g}"
        say(console, f"{name:20} {c.dataset:10} {c.model:16} {c.arm:14} {sizes}")
    return 0
