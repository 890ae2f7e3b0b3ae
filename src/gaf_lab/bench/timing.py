"""Times and their ratios: things timed in turn, and compared within the same round.

Machines are noisy, so what is compared is timed in the same round, and the thing that begins
changes from round to round.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

StepFunction = Callable[[], None]
StepsFunction = Callable[[int], None]  # takes so many

Entry = TypeVar("Entry")


class StepTime(NamedTuple):
    """Milliseconds of a step: on the clock, and of the CPU.

    CPU time is that of all threads and child processes, whatever else the machine does.
    """

    wall: float
    cpu: float

    def __sub__(self, other: "StepTime") -> "StepTime":
        return StepTime(self.wall - other.wall, self.cpu - other.cpu)


def rotate(items: Sequence[Entry], number: int) -> list[Entry]:
    """The items in the order of round `number`."""
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]


def compare_times(prefix: str, ours: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median of ours; the ratio to `base` in the same round: median, 10% and 90%."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=10, method="inclusive")
    found = {
        "ms_median": statistics.median(ours),
        "ratio_median": statistics.median(ratios),
        "ratio_p10": low,
        "ratio_p90": high,
    }
    return {prefix + name: value for name, value in found.items()}


def compare_steps(
    name: str, ours: Sequence[StepTime], base: Sequence[StepTime]
) -> dict[str, float]:
    """`compare_times` on the clock, then of the CPU with the prefix cpu_; `name` is for ratio."""
    wall = compare_times("", [t.wall for t in ours], [t.wall for t in base])
    cpu = compare_times("cpu_", [t.cpu for t in ours], [t.cpu for t in base])
    return {key.replace("ratio", name): value for key, value in (wall | cpu).items()}


def time_in_turn(
    work: Mapping[str, StepsFunction], rounds: int, block: int, device: torch.device
) -> dict[str, list[StepTime]]:
    """Times one step of each in every round.

    Args:
        work: what is timed, by name.
        rounds: how many, after one that is not counted.
        block: steps between two looks at the clock.
        device: is waited for at each look.
    """
    found: dict[str, list[StepTime]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in rotate(list(work), number):
            wall, cpu = now(device)
            work[name](block)
            later = now(device)
            found[name].append(
                StepTime(1000 * (later[0] - wall) / block, 1000 * (later[1] - cpu) / block)
            )
    return {name: times[1:] for name, times in found.items()}


def now(device: torch.device) -> tuple[float, float]:
    """Seconds on the clock and of the CPU, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime
