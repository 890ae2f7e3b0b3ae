"""Which CPU settings train fastest: threads, channels-last, torch.compile; and one process against one for each core.

Each number of threads has a process of its own, which keeps a training for each setting; a block of steps of each in turn is
a round, and ratios are of the same round. Steps are those of `gaf train` with GAF at tau = 2, which accepts every row.

Threads that wait for one another can spin, as GNU's OpenMP has it, or sleep (OMP_WAIT_POLICY=passive). Where other programs
want the cores too, the thread that is waited for may not be running at all, and spinning is no use.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from gaf_lab.bench.ddp import spread
from gaf_lab.progress import Tell, silent
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import CIFAR100_GAF, DEMO
from gaf_lab.training.run import Training

PICTURES = 5000  # a step's time does not depend on how many there are
ON_NOISE = dataclasses.replace(CIFAR100_GAF, dataset="noise", limit=PICTURES, tau=2.0, device="cpu")
CONFIGS = {
    "resnet18": ON_NOISE,
    "convnet": dataclasses.replace(ON_NOISE, model="convnet"),
    "mlp": dataclasses.replace(DEMO, tau=2.0, device="cpu"),
}
BLOCKS = {"resnet18": 1, "convnet": 2, "mlp": 4}  # steps between two looks at the clock
WARM = 3  # steps before: compilation, then buffers that are kept


@dataclass(frozen=True, order=True)
class Setting:
    """How steps are computed: in `processes` processes at once with `threads` threads each, which spin or sleep while they wait."""

    processes: int
    threads: int
    channels_last: bool
    compile: bool
    spin: bool = False


@dataclass(frozen=True)
class Measured:
    """A model under one setting, by rounds: steps per second of all processes, and those under the setting BASE.

    start: seconds to build it and take WARM steps, compilation included. failed: why there are no figures; None where there are.
    """

    model: str
    setting: Setting
    speeds: list[float]
    base: list[float]
    start: float
    failed: str | None = None

    def line(self) -> dict[str, Any]:
        config, setting = CONFIGS[self.model], dataclasses.asdict(self.setting)
        what = {"kind": "bench-cpu", "model": self.model, "k": config.k, "b": config.b, **setting}
        if self.failed is not None:
            return what | {"failed": self.failed}
        found = spread("", self.speeds, self.base)
        rates = {
            "rounds": len(self.speeds),
            "steps_per_second": statistics.median(self.speeds),
            "start_seconds": self.start,
        }
        return what | rates | {name: value for name, value in found.items() if name != "ms_median"}


BASE = Setting(1, 1, False, False)


def settings(cores: int, compile: bool = True) -> list[Setting]:
    """One process with 1, 2, 4, ... and all `cores` threads, and `cores` processes of one thread; each laid out and compiled or not.

    Last what torch does unasked where there are several cores: a thread for each, which spin.
    """
    threads = sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})
    several = cores > 1
    ways = [(1, n) for n in threads] + [(cores, 1)] * several
    found = [
        Setting(*way, last, compiled)
        for way in ways
        for compiled in (False, True)[: 1 + compile]
        for last in (False, True)
    ]
    return found + [Setting(1, cores, False, False, spin=True)] * several


# ---------------------------------------------------------------------------------------------- one process


def serve(pipe: Any, threads: int, config: TrainConfig) -> None:
    """Takes steps as it is told, until it is told None: (channels_last, compile, steps) -> seconds, or an error's first line."""
    torch.set_num_threads(threads)
    made: dict[tuple[bool, bool], Training] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):  # who asked is gone
        for last, compiled, steps in iter(pipe.recv, None):
            pipe.send(
                tried(
                    made, dataclasses.replace(config, channels_last=last, compile=compiled), steps
                )
            )


def tried(made: dict[tuple[bool, bool], Training], config: TrainConfig, steps: int) -> float | str:
    try:
        return taken(made, config, steps)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def taken(made: dict[tuple[bool, bool], Training], config: TrainConfig, steps: int) -> float:
    """Seconds of so many steps; the first time, with building the training."""
    started = time.perf_counter()
    way = config.channels_last, config.compile
    if way not in made:
        made[way] = Training(config, None)
    for _ in range(steps):
        made[way].macro_batch()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------- all of them


class Crew:
    """Processes for a model, by the number of their threads and whether these spin; as many with one thread as there are cores."""

    def __init__(self, config: TrainConfig, cores: int) -> None:
        self.pipes: dict[tuple[int, bool], list[Any]] = {}
        self.processes: list[Any] = []
        for kind in [(1, False)] * (cores - 1) + sorted(
            {(s.threads, s.spin) for s in settings(cores)}
        ):
            with waiting(spin=kind[1]):
                self.pipes.setdefault(kind, []).append(self._another(kind[0], config))

    def _another(self, threads: int, config: TrainConfig) -> Any:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.processes.append(
            context.Process(target=serve, args=(theirs, threads, config), daemon=True)
        )
        self.processes[-1].start()
        theirs.close()
        return ours

    def steps(self, setting: Setting, steps: int) -> float | str:
        """Seconds until all of the setting's processes have taken so many steps each; or what went wrong in one."""
        chosen = self.pipes[setting.threads, setting.spin][: setting.processes]
        started = time.perf_counter()
        for pipe in chosen:
            pipe.send((setting.channels_last, setting.compile, steps))
        said = [answer(pipe) for pipe in chosen]
        return next((s for s in said if isinstance(s, str)), time.perf_counter() - started)

    def close(self) -> None:
        for pipe in itertools.chain(*self.pipes.values()):
            with contextlib.suppress(OSError):  # it is gone already
                pipe.send(None)
        for process in self.processes:
            process.join()


def answer(pipe: Any) -> float | str:
    try:
        said: float | str = pipe.recv()
        return said
    except EOFError:
        return "its process died"


@contextlib.contextmanager
def waiting(spin: bool) -> Iterator[None]:
    """Processes started meanwhile have threads that wait for one another as OpenMP does unasked, or sleep; it looks when it is loaded."""
    name = "OMP_WAIT_POLICY"
    before = os.environ.pop(name, None)
    os.environ.update({} if spin else {name: "passive"})
    try:
        yield
    finally:
        os.environ.pop(name, None)
        os.environ.update({} if before is None else {name: before})


def run(
    models: Sequence[str],
    rounds: int,
    compile: bool = True,
    cores: int | None = None,
    tell: Tell = silent,
) -> list[Measured]:
    """Measures every setting for every model; one setting's failure, such as no C++ compiler, is its own. tell: how far it is."""
    if rounds < 2:
        raise ConfigError(
            f"rounds must be at least 2, for a spread; got {rounds}. Give --rounds 10."
        )
    return [
        measured
        for model in models
        for measured in of_model(model, rounds, compile, cores or os.cpu_count() or 1, tell)
    ]


def of_model(
    model: str, rounds: int, compile: bool, cores: int, tell: Tell = silent
) -> list[Measured]:
    tell(f"{model}, starting", 0, rounds)
    with contextlib.closing(Crew(CONFIGS[model], cores)) as crew:
        starts = {setting: crew.steps(setting, WARM) for setting in settings(cores, compile)}
        failed = {setting: said for setting, said in starts.items() if isinstance(said, str)}
        speeds: dict[Setting, list[float]] = {
            setting: [] for setting in starts if setting not in failed
        }
        for number, order in enumerate(turns(list(speeds), rounds)):
            tell(model, number, rounds)
            for setting in order:
                seconds = crew.steps(setting, BLOCKS[model])
                assert not isinstance(seconds, str), seconds
                speeds[setting].append(setting.processes * BLOCKS[model] / seconds)
    return [
        Measured(
            model,
            setting,
            speeds.get(setting, []),
            speeds[BASE],
            0.0 if isinstance(said, str) else said,
            failed.get(setting),
        )
        for setting, said in starts.items()
    ]


def turns(items: list[Setting], rounds: int) -> Iterator[list[Setting]]:
    """The items in every round, the one that begins changing from round to round."""
    for number in range(rounds):
        turn = number % len(items)
        yield items[turn:] + items[:turn]


# ---------------------------------------------------------------------------------------------- the choice


def chosen(lines: Sequence[dict[str, Any]], compiled: bool) -> dict[str, Any]:
    """Of one model's lines with one process, compiled or not, the fastest; a gain within the spread of the rounds counts for nothing.

    Simple things come first: threads that sleep, then no channels-last, then fewer threads.
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
    """Steps after which compiling has paid for its start; None where a compiled step is no faster."""
    saved = 1 / eager["steps_per_second"] - 1 / compiled["steps_per_second"]
    return (compiled["start_seconds"] - eager["start_seconds"]) / saved if saved > 0 else None


def crowd(lines: Sequence[dict[str, Any]], choice: dict[str, Any]) -> dict[str, Any] | None:
    """The line of one process of one thread for each core, otherwise set as the choice is; None on one core."""
    same = (line for line in lines if line["processes"] > 1 and "failed" not in line)
    return next(
        (
            line
            for line in same
            if all(line[name] == choice[name] for name in ("channels_last", "compile"))
        ),
        None,
    )


def advice(found: Sequence[Measured], model: str) -> str:
    return told([m.line() for m in found if m.model == model])


def told(lines: Sequence[dict[str, Any]]) -> str:
    """The choice for one model, in words."""
    eager = chosen(lines, compiled=False)
    layout = ("channels-last" if eager["channels_last"] else "the usual layout") + (
        ", spinning" if eager["spin"] else ""
    )
    text = f"{eager['threads']} thread{'s' if eager['threads'] > 1 else ''}, {layout}: {eager['steps_per_second']:.3g} steps/s"
    if not any(line["compile"] for line in lines):
        text += "; compiling was not measured"
    elif any(line["compile"] and "failed" not in line for line in lines):
        compiled = chosen(lines, compiled=True)
        steps = break_even(eager, compiled)
        text += (
            "; compiling does not pay"
            if steps is None
            else f"; compiling pays from {steps:,.0f} steps on"
        )
    else:
        text += "; compiling failed"
    many = crowd(lines, eager)
    if many is None:
        return text
    gain = many["steps_per_second"] / eager["steps_per_second"]
    return f"{text}; {many['processes']} runs at once, one thread each: {gain:.2f} times the steps of one"


def table(found: Sequence[Measured]) -> Table:
    result = Table(
        title="Training steps per second under CPU settings",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "model",
        "runs",
        "threads",
        "channels-last",
        "compiled",
        "spin",
        "steps/s",
        "ratio",
        "10-90%",
        "start",
    ):
        result.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for line in (m.line() for m in found):
        result.add_row(*cells(line))
    result.caption = (
        "medians; ratio: steps per second over those of one run with one thread in the same round\n"
        "start: seconds to the third step"
    )
    return result


def cells(line: dict[str, Any]) -> list[str]:
    marks = ["yes" if line[name] else "" for name in ("channels_last", "compile", "spin")]
    way = [line["model"], str(line["processes"]), str(line["threads"]), *marks]
    if "failed" in line:
        return [*way, f"failed: {line['failed'][:30]}", "", "", ""]
    spread = f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}"
    return [
        *way,
        f"{line['steps_per_second']:.2f}",
        f"{line['ratio_median']:.2f}",
        spread,
        f"{line['start_seconds']:.0f}",
    ]
