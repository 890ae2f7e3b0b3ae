"""The CPU settings that are compared, and which of them to choose, by their measured lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Setting:
    """How steps are computed: in `processes` processes with `threads` threads each.

    The threads spin or sleep while they wait for one another.
    """

    processes: int
    threads: int
    channels_last: bool
    compile: bool
    spin: bool = False


BASE = Setting(1, 1, False, False)


def all_settings(cores: int, compile: bool = True) -> list[Setting]:
    """One process with 1, 2, 4, ... and all `cores` threads; `cores` processes of one thread.

    Each is measured with and without channels-last and compilation. The last setting is torch's
    default on several cores: a thread for each, which spin.
    """
    threads = sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})
    ways = [(1, n) for n in threads]
    if cores > 1:
        ways.append((cores, 1))
    found = [
        Setting(*way, last, compiled)
        for way in ways
        for compiled in (False, True)[: 1 + compile]
        for last in (False, True)
    ]
    if cores > 1:
        found.append(Setting(1, cores, False, False, spin=True))
    return found


def fastest(lines: Sequence[dict[str, Any]], compiled: bool) -> dict[str, Any]:
    """The fastest of one model's lines with one process, compiled or not.

    A gain within the spread of the rounds does not count. Simple settings are preferred: sleeping
    threads, then the usual layout, then fewer threads.
    """
    rivals = [
        line
        for line in lines
        if line["processes"] == 1 and line["compile"] == compiled and "failed" not in line
    ]
    rivals.sort(key=lambda line: (line["spin"], line["channels_last"], line["threads"]))
    best = rivals[0]
    for line in rivals[1:]:
        if line["ratio_p10"] > best["ratio_median"] and line["ratio_median"] > best["ratio_p90"]:
            best = line
    return best


def break_even(eager: dict[str, Any], compiled: dict[str, Any]) -> float | None:
    """Steps until compiling has paid for its start; None if a compiled step is no faster."""
    saved = 1 / eager["steps_per_second"] - 1 / compiled["steps_per_second"]
    return (compiled["start_seconds"] - eager["start_seconds"]) / saved if saved > 0 else None


def crowd(lines: Sequence[dict[str, Any]], choice: dict[str, Any]) -> dict[str, Any] | None:
    """The line of a process of one thread on each core, with the choice's other settings.

    None on one core.
    """
    for line in lines:
        same = all(line[name] == choice[name] for name in ("channels_last", "compile"))
        if same and line["processes"] > 1 and "failed" not in line:
            return line
    return None


def describe_choice(lines: Sequence[dict[str, Any]]) -> str:
    """The choice for one model, in words."""
    eager = fastest(lines, compiled=False)
    layout = "channels-last" if eager["channels_last"] else "the usual layout"
    text = (
        f"{eager['threads']} thread{'s' if eager['threads'] > 1 else ''}, {layout}"
        f"{', spinning' if eager['spin'] else ''}: {eager['steps_per_second']:.3g} steps/s; "
        f"{describe_compiling(lines, eager)}"
    )
    many = crowd(lines, eager)
    if many is None:
        return text
    gain = many["steps_per_second"] / eager["steps_per_second"]
    return (
        f"{text}; {many['processes']} runs at once, one thread each: "
        f"{gain:.2f} times the steps of one"
    )


def describe_compiling(lines: Sequence[dict[str, Any]], eager: dict[str, Any]) -> str:
    """Whether and when compiling pays."""
    compiled = [line for line in lines if line["compile"]]
    if not compiled:
        return "compiling was not measured"
    if all("failed" in line for line in compiled):
        return "compiling failed"
    steps = break_even(eager, fastest(lines, compiled=True))
    if steps is None:
        return "compiling does not pay"
    return f"compiling pays from {steps:,.0f} steps on"
