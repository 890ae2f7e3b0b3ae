"""`gaf data`: fetches a data set, or reads data of the user's own, and shows the contents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from gaf_lab.commands.common import Words, say
from gaf_lab.settings.checks import ConfigError


@dataclass
class DataOptions:
    """Fetches a data set, or reads your own (--from), and shows its contents."""

    name: Positional[str] = ""
    """digits, mnist5k, fashion-mnist, cifar10, cifar100, cifar100n, cifar100n-coarse,
    noise or imagenet."""
    data: Path | None = None
    """Folder with the archive or its unpacked folder; without it, the data set is downloaded."""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Your own data in place of a name: folder:DIR (pictures in folders of classes), csv:FILE (a
    table), npz:FILE (arrays x and y), or hf:DIR (a Hugging Face dataset on disk)."""
    label: str | None = None
    """For --from csv and hf: the column of labels; without it, the table's last one."""
    numbers: bool = False
    """For --from csv: the labels are numbers to predict, although all of them may be whole."""
    size: int | None = None
    """For --from folder and hf: height and width to scale pictures to."""
    out: Path | None = None
    """For --from: the .npz file to write, for gaf train --task gaf_lab.tasks.arrays:arrays."""


def run_data(words: Words, console: Console) -> int:
    options = tyro.cli(DataOptions, prog="gaf data", args=words)
    if bool(options.name) == bool(options.source):
        raise ConfigError(
            "data needs the name of a data set, or --from for your own, and not both; "
            f"got {options.name!r} and {options.source!r}. See gaf data --help."
        )
    optional = ("label", "numbers", "size", "out")
    given = [name for name in optional if getattr(options, name) not in (None, False)]
    if options.name and given:
        raise ConfigError(
            f"{given[0]} goes with --from alone; got it with {options.name!r}. Leave it out."
        )
    return convert_own(options, console) if options.source else show_dataset(options, console)


def show_dataset(options: DataOptions, console: Console) -> int:
    from gaf_lab.data.dataset import describe_dataset
    from gaf_lab.data.sets import load_dataset
    from gaf_lab.training.console import Progress

    with Progress(console, "part") as progress:
        progress(f"reading {options.name}", 1, 2)
        loaded = load_dataset(options.name, options.data)
        progress(f"counting {options.name}", 2, 2)
        facts = describe_dataset(loaded)
    show_facts(facts, console)
    return 0


def convert_own(options: DataOptions, console: Console) -> int:
    from gaf_lab.data.arrays import describe_arrays, write_arrays
    from gaf_lab.data.convert import read_from
    from gaf_lab.records.output import make_file, replace_whole

    check_out(options)
    found = read_from(options.source, options.label, options.size, options.numbers)
    show_facts(describe_arrays(found), console)
    if options.out is None:
        return 0
    make_file(options.out)
    with replace_whole(options.out) as part:
        write_arrays(found, part)
    say(console, f"Written: {options.out}")
    for command in ("train", "audit"):
        task = "--task gaf_lab.tasks.arrays:arrays"
        say(console, f"{command.title()}: gaf {command} {task} --data {options.out}")
    return 0


def check_out(options: DataOptions) -> None:
    """ConfigError where the file to write is no .npz, or is the source."""
    out, source = options.out, Path(options.source.partition(":")[2])
    if out is None:
        return
    if out.suffix != ".npz":
        raise ConfigError(f"out must be a file that ends in .npz; got {str(out)!r}. Add .npz.")
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(
            f"out must be another file than the source, which would be lost; got {str(out)!r} for "
            "both. Give a new name."
        )


def show_facts(facts: dict[str, str], console: Console) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    for fact, value in facts.items():
        table.add_row(fact, value)
    console.print(table)
