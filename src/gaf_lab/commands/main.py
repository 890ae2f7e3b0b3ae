"""The command `gaf`: finds the command, runs it, and turns errors into messages and exit codes."""

import sys

from rich.console import Console

from gaf_lab.commands.audit import AuditOptions, run_audit
from gaf_lab.commands.bench import run_bench
from gaf_lab.commands.common import Command, Words, say
from gaf_lab.commands.data import DataOptions, run_data
from gaf_lab.commands.demo import DemoOptions, run_demo
from gaf_lab.commands.paper import PaperOptions, run_paper
from gaf_lab.commands.presets import PresetsOptions, run_presets
from gaf_lab.commands.probe import ProbeOptions, run_probe
from gaf_lab.commands.report import ReportOptions, run_report
from gaf_lab.commands.sweep import SweepOptions, run_sweep
from gaf_lab.commands.train import TrainOptions, run_train, under_torchrun
from gaf_lab.own_code import own_part, own_place
from gaf_lab.plain_warnings import plain_warnings
from gaf_lab.settings.checks import ConfigError, first_line, nearest

COMMANDS: dict[str, tuple[Command, str | None]] = {
    "demo": (run_demo, DemoOptions.__doc__),
    "train": (run_train, TrainOptions.__doc__),
    "sweep": (run_sweep, SweepOptions.__doc__),
    "paper": (run_paper, PaperOptions.__doc__),
    "probe": (run_probe, ProbeOptions.__doc__),
    "audit": (run_audit, AuditOptions.__doc__),
    "report": (run_report, ReportOptions.__doc__),
    "data": (run_data, DataOptions.__doc__),
    "bench": (
        run_bench,
        "What a step costs: gaf bench train, accumulate, samples, ddp, hsdp; gaf bench cpu: which "
        "settings are fast on a CPU.",
    ),
    "presets": (run_presets, PresetsOptions.__doc__),
}
SMALLER = "Lower --b, --k, --rows or --size, or take a smaller --model."


def main(words: Words | None = None) -> int:
    """Runs `gaf WORDS...`. An error that a user can fix becomes one message and exit code 2."""
    words = sys.argv[1:] if words is None else words
    with plain_warnings():
        return run_on_each_rank(words)


def run_on_each_rank(words: Words) -> int:
    if not (words[:1] == ["train"] and under_torchrun()):
        return run_command(words, Console(emoji=False))
    from gaf_lab.training import ranks

    group = ranks.join()
    try:
        code = run_command(words, Console(quiet=not group.leads, emoji=False))
    except ranks.Elsewhere:
        code = 2
    return ranks.leave(code)


def run_command(words: Words, console: Console) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        return show_overview(console)
    if words[0] in ("-V", "--version", "version"):
        import gaf

        say(console, f"gaf {gaf.__version__}")
        return 0
    if words[0] not in COMMANDS:
        known = nearest(words[0], [*COMMANDS, "help", "--help", "--version"])
        message = f"unknown command {words[0]!r}.{known} There are: {', '.join(COMMANDS)}."
        say(Console(stderr=True, emoji=False), f"gaf: {message}")
        return 2
    return exit_code(words[0], words[1:], console)


def exit_code(name: str, words: Words, console: Console) -> int:
    """Runs a command that exists."""
    try:
        return COMMANDS[name][0](words, console)
    except KeyboardInterrupt:
        say(Console(stderr=True, emoji=False), f"\ngaf {name}: stopped.")
        return 130
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        return 1
    except user_errors() as error:
        return refuse(name, f"{error}{own_place(error)}")
    except Exception as error:
        if is_out_of_memory(error):
            fault = f"the machine must have more memory; {first_line(error)}."
            return refuse(name, f"{fault} {SMALLER}")
        if own := own_part(error):
            return refuse(name, f"an error in code of your own:\n{own.rstrip()}")
        raise


def refuse(name: str, message: str) -> int:
    """Shows what a user can fix, and returns the exit code for it."""
    Console(stderr=True, soft_wrap=True, emoji=False).print(
        f"gaf {name}: {message}", style="red", markup=False, highlight=False
    )
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or the accelerator had no more memory.

    torch has an error type for the accelerator alone, so the message decides.
    """
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(p in str(error).lower() for p in phrases)


def show_overview(console: Console) -> int:
    say(
        console,
        "gaf: gradient agreement filtering\n\n"
        "usage: gaf COMMAND [OPTIONS]; gaf COMMAND --help; gaf --version\n",
    )
    for name, (_, text) in COMMANDS.items():
        say(console, f"  {name:8} {' '.join((text or '').split())}")
    return 0


def user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message has all that a user needs."""
    from gaf_lab.data.sources import DataError
    from gaf_lab.records.checkpoint import CheckpointError
    from gaf_lab.training.diverged import Diverged

    return ConfigError, ValueError, OSError, DataError, CheckpointError, Diverged


if __name__ == "__main__":
    raise SystemExit(main())
