"""What filtering costs under HSDP: FSDP2's own average, gaf.attach, and gathering all replicas.

The ways take turns in one run (`hsdp_rank`). Every figure is that of the slowest rank, and a ratio
is to plain HSDP in the same round.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from gaf_lab.bench import launch
from gaf_lab.bench.hsdp_rank import hsdp_rank_main
from gaf_lab.bench.hsdp_ways import HSDP, HSDP_WAYS, LATE, HSDPSetup
from gaf_lab.bench.timing import StepTime, compare_steps
from gaf_lab.bench.ways import build_model
from gaf_lab.progress import Tell, silent


@dataclass(frozen=True)
class HSDPCost:
    """One way: a step's times by rounds; bytes and memory of a rank."""

    way: str
    setup: HSDPSetup
    shard_bytes: int
    times: list[StepTime]
    plain_times: list[StepTime]
    late_times: list[StepTime]  # of gaf.attach that sends nothing during the pass
    sent: dict[str, float]
    peak_bytes: int | None
    plain_peak_bytes: int | None

    def line(self) -> dict[str, Any]:
        return {
            "kind": "bench-hsdp",
            "way": self.way,
            "replicas": self.setup.replicas,
            "shards": self.setup.shards,
            "rounds": len(self.times),
            "shard_bytes": self.shard_bytes,
            **compare_steps("ratio", self.times, self.plain_times),
            **compare_steps("of_late", self.times, self.late_times),
            "sent_bytes": sum(self.sent.values()),
            "sent": self.sent,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20,
            "extra_shards": self.extra_shards(),
        }

    def extra_shards(self) -> float | None:
        if self.peak_bytes is None or self.plain_peak_bytes is None:
            return None
        return (self.peak_bytes - self.plain_peak_bytes) / self.shard_bytes


def measure_hsdp(setup: HSDPSetup, memory: bool = True, tell: Tell = silent) -> list[HSDPCost]:
    """Measures every way among replicas x shards processes of this machine.

    Args:
        setup: the sizes.
        memory: whether to measure the peaks too, each in fresh processes.
        tell: the progress.
    """
    launch.preload(hsdp_rank_main.__module__)
    W, measured = setup.replicas * setup.shards, HSDP_WAYS if memory else ()
    tell("times", 0, 1 + len(measured))
    times = launch.run_ranks(hsdp_rank_main, setup, W)
    peaks: dict[str, int | None] = {}
    for number, way in enumerate(measured, 1):
        tell(f"memory of {way}", number, 1 + len(measured))
        peak_of_way = dataclasses.replace(setup, peak=way)
        peaks[way] = launch.run_ranks(hsdp_rank_main, peak_of_way, W)["peak_bytes"]
    return hsdp_costs(setup, times, peaks)


def hsdp_costs(
    setup: HSDPSetup, times: dict[str, Any], peaks: dict[str, int | None]
) -> list[HSDPCost]:
    """From what rank 0 wrote to a cost of each way. peaks: by way; empty if not measured."""
    return [
        HSDPCost(
            way,
            setup,
            times["shard_bytes"],
            [StepTime(*pair) for pair in times["times"][way]],
            [StepTime(*pair) for pair in times["times"][HSDP]],
            [StepTime(*pair) for pair in times["times"][LATE]],
            times["sent"][way],
            peaks.get(way),
            peaks.get(HSDP),
        )
        for way in HSDP_WAYS
    ]


def hsdp_conditions(setup: HSDPSetup) -> dict[str, Any]:
    bare = build_model(setup.model, setup.stem)
    given = {name: value for name, value in dataclasses.asdict(setup).items() if name != "peak"}
    parameters = sum(p.numel() for p in bare.parameters())
    return given | {"backend": "gloo", "pictures": "3x32x32", "parameters": parameters}


def hsdp_table(found: list[HSDPCost]) -> Table:
    result = Table(
        title="A step under HSDP against plain HSDP in the same round",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("way", "ms", "ratio", "10-90%", "CPU", "sent", "shards"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in (cost.line() for cost in found):
        extra = line["extra_shards"]
        result.add_row(
            line["way"],
            f"{line['ms_median']:.0f}",
            f"{line['ratio_median']:.3f}",
            f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
            f"{line['cpu_ratio_median']:.3f}",
            f"{line['sent_bytes'] / 1e6:.1f}",
            "-" if extra is None else f"{extra:+.2f}",
        )
    result.caption = (
        "medians; CPU: a rank's CPU time, ratio\n"
        "sent: MB per rank and step to the other replicas, counted\n"
        "shards: gradient shards held beyond plain HSDP at the peak"
    )
    return result
