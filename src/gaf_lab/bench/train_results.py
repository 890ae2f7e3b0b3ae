"""What `gaf bench train` reports: a line for each way to train and each part of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from gaf_lab.bench.timing import StepTime, compare_steps

AVERAGING, ALL, PAPER, PLAIN_LOOP = "averaging", "GAF, tau 2", "GAF, tau 0.97", "plain loop"
DATA = "data and augmentation"
BOOKS = "records and progress bar"
PASSES = "forward and backward"
REST = "filter and optimizer"
SAVING = "checkpoints, spread over steps"


@dataclass(frozen=True)
class ArmTime:
    """One way to train: what its steps took by rounds.

    averaging, plain: what the steps of averaging and of the first plain loop took. stepped: the
    share of steps taken.
    """

    name: str
    took: list[StepTime]
    averaging: list[StepTime]
    plain: list[StepTime]
    stepped: float

    def line(self) -> dict[str, Any]:
        """times_plain: steps per second over the plain loop's."""
        own = compare_steps("ratio", self.took, self.averaging)
        over = compare_steps("times_plain", self.plain, self.took)
        return {
            "kind": "bench-train",
            "arm": self.name,
            "rounds": len(self.took),
            "steps_per_second": 1000 / own["ms_median"],
            "stepped": self.stepped,
            **own,
            **{key: value for key, value in over.items() if "times_plain" in key},
        }


@dataclass(frozen=True)
class PartTime:
    """One part of GAF's step: what it took by rounds, and what whole steps took."""

    name: str
    took: list[StepTime]
    whole: list[StepTime]

    def line(self) -> dict[str, Any]:
        shares = compare_steps("share", self.took, self.whole)
        return {
            "kind": "bench-train-part",
            "part": self.name,
            "rounds": len(self.took),
            **shares,
        }


def arm_table(found: Sequence[ArmTime | PartTime]) -> Table:
    result = Table(title="Training steps", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("arm", "steps/s", "ratio", "10-90%", "CPU", "x plain", "taken"):
        result.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for line in (arm.line() for arm in found if isinstance(arm, ArmTime)):
        result.add_row(
            line["arm"],
            f"{line['steps_per_second']:.2f}",
            f"{line['ratio_median']:.3f}",
            f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
            f"{line['cpu_ratio_median']:.3f}",
            f"{line['times_plain_median']:.2f}",
            f"{100 * line['stepped']:.0f}%",
        )
    result.caption = (
        "medians; ratio: time over averaging's in the same round, CPU: by CPU time\n"
        "x plain: steps per second over the plain loop's; taken: share of steps"
    )
    return result


def part_table(found: Sequence[ArmTime | PartTime]) -> Table:
    result = Table(title=f"Where a step of {ALL} goes", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("part", "ms", "share", "10-90%", "CPU"):
        result.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for line in (part.line() for part in found if isinstance(part, PartTime)):
        result.add_row(
            line["part"],
            f"{line['ms_median']:.2f}",
            f"{100 * line['share_median']:.2f}%",
            f"{100 * line['share_p10']:.2f}-{100 * line['share_p90']:.2f}%",
            f"{100 * line['cpu_share_median']:.2f}%",
        )
    result.caption = f"each by itself in the same round, CPU: by CPU time\n{REST}: what is left"
    return result
