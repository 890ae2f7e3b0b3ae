"""Which CPU settings train fastest: threads, channels-last, torch.compile; one process or many.

Each number of threads has its own process (`crew`), which keeps a training for each setting. A
round is a block of steps of each in turn, and ratios are of the same round. Steps are those of
`gaf train` with GAF at tau = 2, which accepts every row.

Threads that wait for one another can spin, the default of GNU's OpenMP, or sleep
(OMP_WAIT_POLICY=passive). If other programs want the cores too, the thread that is waited for may
not be running, and spinning is of no use.
"""

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from gaf_lab.bench.cpu_settings import BASE, Setting, all_settings, describe_choice
from gaf_lab.bench.crew import Crew
from gaf_lab.bench.timing import compare_times, rotate
from gaf_lab.progress import Tell, silent
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.presets import CIFAR100_GAF, DEMO

NOISE_PICTURES = 5000  # a step's time does not depend on how many there are
ON_NOISE = dataclasses.replace(
    CIFAR100_GAF, dataset="noise", limit=NOISE_PICTURES, tau=2.0, device="cpu"
)
CONFIGS = {
    "resnet18": ON_NOISE,
    "convnet": dataclasses.replace(ON_NOISE, model="convnet"),
    "mlp": dataclasses.replace(DEMO, tau=2.0, device="cpu"),
}
BLOCKS = {"resnet18": 1, "convnet": 2, "mlp": 4}  # steps between two looks at the clock
START_STEPS = 3  # not counted: compilation, then buffers that are kept


@dataclass(frozen=True)
class SettingSpeed:
    """A model under one setting, by rounds: steps per second of all processes, and under BASE.

    start: seconds to build the training and take START_STEPS steps, compilation included. failed:
    why there are no figures; None if there are.
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
        ratios = compare_times("", self.speeds, self.base)
        del ratios["ms_median"]
        rates = {
            "rounds": len(self.speeds),
            "steps_per_second": statistics.median(self.speeds),
            "start_seconds": self.start,
        }
        return what | rates | ratios


def measure_settings(
    models: Sequence[str],
    rounds: int,
    compile: bool = True,
    cores: int | None = None,
    tell: Tell = silent,
) -> list[SettingSpeed]:
    """Measures every setting for every model.

    A setting that fails, such as for want of a C++ compiler, does not disturb the others.

    Args:
        models: names in CONFIGS.
        rounds: at least 2.
        compile: whether to measure torch.compile.
        cores: of the machine; None: as many as it has.
        tell: is called with the progress.
    """
    if rounds < 2:
        raise ConfigError(
            f"rounds must be at least 2, for a spread; got {rounds}. Give --rounds 10."
        )
    found = []
    for model in models:
        found += measure_model(model, rounds, compile, cores or os.cpu_count() or 1, tell)
    return found


def measure_model(
    model: str, rounds: int, compile: bool, cores: int, tell: Tell = silent
) -> list[SettingSpeed]:
    tell(f"{model}, starting", 0, rounds)
    with contextlib.closing(Crew(CONFIGS[model], cores)) as crew:
        starts = {s: crew.steps(s, START_STEPS) for s in all_settings(cores, compile)}
        speeds: dict[Setting, list[float]] = {
            setting: [] for setting, start in starts.items() if not isinstance(start, str)
        }
        for number in range(rounds):
            tell(model, number, rounds)
            for setting in rotate(list(speeds), number):
                seconds = crew.steps(setting, BLOCKS[model])
                assert not isinstance(seconds, str), seconds
                speeds[setting].append(setting.processes * BLOCKS[model] / seconds)
    found = []
    for setting, start in starts.items():
        if isinstance(start, str):
            found.append(SettingSpeed(model, setting, [], speeds[BASE], 0.0, failed=start))
        else:
            found.append(SettingSpeed(model, setting, speeds[setting], speeds[BASE], start))
    return found


def advice(found: Sequence[SettingSpeed], model: str) -> str:
    return describe_choice([each.line() for each in found if each.model == model])


def table(found: Sequence[SettingSpeed]) -> Table:
    result = Table(
        title="Training steps per second under CPU settings",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    settings = ("model", "runs", "threads", "channels-last", "compiled", "spin")
    for column in (*settings, "steps/s", "ratio", "10-90%", "start"):
        result.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for each in found:
        result.add_row(*setting_cells(each.line()))
    result.caption = (
        "medians; ratio: steps per second over those of one run with one thread in the same "
        "round\n"
        "start: seconds to the third step"
    )
    return result


def setting_cells(line: dict[str, Any]) -> list[str]:
    marks = ["yes" if line[name] else "" for name in ("channels_last", "compile", "spin")]
    setting = [line["model"], str(line["processes"]), str(line["threads"]), *marks]
    if "failed" in line:
        return [*setting, f"failed: {line['failed'][:30]}", "", "", ""]
    return [
        *setting,
        f"{line['steps_per_second']:.2f}",
        f"{line['ratio_median']:.2f}",
        f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
        f"{line['start_seconds']:.0f}",
    ]
