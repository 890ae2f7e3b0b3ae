"""What the commands share: lines on the console, and the config behind a command's options."""

import dataclasses
from collections.abc import Callable, Sized
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

from gaf_lab.settings.checks import check_tau
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import find_preset
from gaf_lab.settings.reading import OWN_TASK, from_toml

Words = list[str]
Command = Callable[[Words, Console], int]


def say(console: Console, text: str) -> None:
    """Prints a line unchanged; a terminal wraps it if it is too long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def failures_code(console: Console, failed: Sized) -> int:
    """The exit code of a sweep with these failed runs, each of which was shown when it failed."""
    if not failed:
        return 0
    say(
        console,
        f"Failed: {len(failed)}, each shown above with its reason. Fix that, and give the same "
        "command: it tries them again, and repeats no run that is finished.",
    )
    return 1


def show_file(console: Console, what: str, path: Path) -> None:
    """A line with a file's path, which a click opens in a terminal."""
    link = Style(link=path.resolve().as_uri())
    console.print(Text.assemble(f"{what} ", (str(path), link)), soft_wrap=True)


def base_config(words: Words, default: TrainConfig | None = None) -> TrainConfig:
    """The config before the command line's own options: defaults, preset, TOML file."""
    default = default or TrainConfig()
    if asks_for_help(words):  # help is shown even if a file or name is wrong
        return default
    check_tau(value_of(words, "--tau"))  # before the parser, which only reports "no float"
    preset, toml = value_of(words, "--preset"), value_of(words, "--toml")
    base = default if preset is None else find_preset(preset)
    if value_of(words, "--task"):
        base = dataclasses.replace(base, **OWN_TASK)
    base = base if toml is None else from_toml(Path(toml), base)
    if value_of(words, "--task"):  # in place of another one, whose source it does not have
        base = dataclasses.replace(base, task="", task_source="")
    return base


def asks_for_help(words: Words) -> bool:
    return "-h" in words or "--help" in words


def value_of(words: Words, option: str) -> str | None:
    """The option's value on the command line; None without the option."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.split("=", 1)[1]
    return None
