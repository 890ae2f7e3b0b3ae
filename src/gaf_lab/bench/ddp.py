"""What filtering costs among processes: plain DDP, gaf.attach, and gathering every gradient.

All ways take turns in one run (`ddp_rank`). gaf.attach measures, guards or filters; if it measures
every n-th step only, that step's cost counts for 1/n of an average step. Every figure is that of
the slowest rank, and a ratio is to plain DDP in the same round.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from gaf_lab.bench import launch
from gaf_lab.bench.bytes_sent import volume
from gaf_lab.bench.ddp_rank import DDPSetup, rank_main
from gaf_lab.bench.timing import compare_times
from gaf_lab.bench.ways import PLAIN, build_model
from gaf_lab.progress import Tell, silent


@dataclass(frozen=True)
class DDPCost:
    """One way at one k: milliseconds by rounds, of a step and of its aggregation alone; bytes and
    memory of a rank."""

    way: str
    k: int
    gradient_bytes: int
    ms: list[float]
    plain_ms: list[float]
    alone_ms: list[float]
    plain_alone_ms: list[float]
    sent: dict[str, float]
    wire_bytes: float | None
    peak_bytes: int | None
    plain_peak_bytes: int | None

    def line(self) -> dict[str, Any]:
        return {
            "kind": "bench-ddp",
            "way": self.way,
            "k": self.k,
            "rounds": len(self.ms),
            "gradient_bytes": self.gradient_bytes,
            **compare_times("", self.ms, self.plain_ms),
            **compare_times("alone_", self.alone_ms, self.plain_alone_ms),
            "sent_bytes": sum(self.sent.values()),
            "sent": self.sent,
            "wire_bytes": self.wire_bytes,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20,
            "extra_gradients": self.extra_gradients(),
        }

    def extra_gradients(self) -> float | None:
        if self.peak_bytes is None or self.plain_peak_bytes is None:
            return None
        return (self.peak_bytes - self.plain_peak_bytes) / self.gradient_bytes


def measure_ddp(setup: DDPSetup, ks: tuple[int, ...], tell: Tell = silent) -> list[DDPCost]:
    """Measures every way among k processes of this machine, for every k. tell: the progress."""
    check_ddp_setup(setup, ks)
    launch.preload(rank_main.__module__)
    found = []
    for k in ks:
        tell(f"k = {k}, times", 0, 1 + len(setup.ways))
        times, peaks = launch.run_ranks(rank_main, setup, k), {}
        for number, way in enumerate(setup.ways, 1):
            tell(f"k = {k}, memory", number, 1 + len(setup.ways))
            peak_of_way = dataclasses.replace(setup, peak=way)
            peaks[way] = launch.run_ranks(rank_main, peak_of_way, k)["peak_bytes"]
        found += ddp_costs(k, times, peaks)
    return found


def check_ddp_setup(setup: DDPSetup, ks: tuple[int, ...]) -> None:
    if setup.rounds < 2:
        raise ValueError(
            f"rounds: must be at least 2, for a spread; got {setup.rounds}. Give --rounds 20."
        )
    if setup.b < 2:
        raise ValueError(f"b: must be at least 2, for BatchNorm; got {setup.b}. Give --b 32.")
    if not ks or min(ks) < 2:
        given = ", ".join(map(str, ks)) or "none"
        raise ValueError(f"k: must be at least 2 processes; got {given}. Give --k 2 4.")


def ddp_costs(k: int, times: dict[str, Any], peaks: dict[str, int | None]) -> list[DDPCost]:
    """From what rank 0 wrote to a cost of each way. peaks: by way; empty if not measured."""
    ms, alone = times["ms"], times["alone_ms"]
    return [
        DDPCost(
            way,
            k,
            times["gradient_bytes"],
            ms[way],
            ms[PLAIN],
            alone[way],
            alone[PLAIN],
            times["sent"][way],
            times["wire_bytes"][way],
            peaks.get(way),
            peaks.get(PLAIN),
        )
        for way in ms
    ]


def ddp_conditions(setup: DDPSetup) -> dict[str, Any]:
    bare = build_model(setup.model, setup.stem)
    given = {
        name: value
        for name, value in dataclasses.asdict(setup).items()
        if name not in ("peak", "ways")
    }
    return given | {
        "pictures": "3x32x32",
        "parameters": sum(p.numel() for p in bare.parameters()),
        "buffer_bytes": volume(*bare.buffers()),
    }


def table(found: list[DDPCost]) -> Table:
    result = Table(
        title="A step among k processes against plain DDP in the same round",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    times = ("ms", "ratio", "10-90%", "alone", "ratio")
    for column in ("k", "way", *times, "sent", "wire", "gradients"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in (cost.line() for cost in found):
        result.add_row(str(line["k"]), line["way"], *cost_cells(line))
    result.caption = (
        "medians; alone: the aggregation without the pass\n"
        "sent: MB per rank and step, counted; wire: at the interface\n"
        "gradients: held beyond plain DDP at the peak"
    )
    return result


def cost_cells(line: dict[str, Any]) -> list[str]:
    extra, wire = line["extra_gradients"], line["wire_bytes"]
    return [
        f"{line['ms_median']:.0f}",
        f"{line['ratio_median']:.3f}",
        f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
        f"{line['alone_ms_median']:.0f}",
        f"{line['alone_ratio_median']:.2f}",
        f"{line['sent_bytes'] / 1e6:.1f}",
        "-" if wire is None else f"{wire / 1e6:.1f}",
        "-" if extra is None else f"{extra:+.2f}",
    ]
