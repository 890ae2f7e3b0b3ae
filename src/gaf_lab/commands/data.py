"""`gaf data`: fetches a data set and shows its contents."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import Positional

from gaf_lab.commands.common import Words


@dataclass
class DataOptions:
    """Fetches a data set, verifies it, and shows its contents."""

    name: Positional[str]
    """digits, mnist5k, fashion-mnist, cifar10, cifar100, cifar100n, cifar100n-coarse,
    noise or imagenet."""
    data: Path | None = None
    """Folder with the archive or its unpacked folder; without it, the data set is downloaded."""


def run_data(words: Words, console: Console) -> int:
    options = tyro.cli(DataOptions, prog="gaf data", args=words)
    from rich.table import Table

    from gaf_lab.data.dataset import describe_dataset
    from gaf_lab.data.sets import load_dataset
    from gaf_lab.training.console import Progress

    table = Table(show_header=False)
    with Progress(console, "part") as progress:
        progress(f"reading {options.name}", 1, 2)
        loaded = load_dataset(options.name, options.data)
        progress(f"counting {options.name}", 2, 2)
        facts = describe_dataset(loaded)
    for fact, value in facts.items():
        table.add_row(fact, value)
    console.print(table)
    return 0
