"""The cost model's predictions as tables, also beside what `gaf bench ddp` measured."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gaf_lab.bench.bytes_sent import ring_all_reduce
from gaf_lab.bench.cost_model import (
    Network,
    gaf_bytes,
    gaf_seconds,
    micro_group_for,
    plain_seconds,
)
from gaf_lab.bench.ways import GAF, PLAIN

KS = tuple(2**i for i in range(1, 13))


def table(size: float, network: Network, ks: Sequence[int] = KS) -> Table:
    """Milliseconds for every k: all-reduce, GAF and its parts, and GAF with at most 32 rows."""
    result = Table(
        title="Predicted milliseconds of a step's aggregation",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    parts = ("in", "scalars", "Gram", "out")
    for column in ("k", "all-reduce", "GAF", "ratio", *parts, "m", "GAF m", "ratio"):
        result.add_column(column, justify="right", no_wrap=True)
    for k in ks:
        result.add_row(*prediction_cells(k, size, network))
    result.caption = (
        "GAF m: micro_group, m ranks whose average is a row\n"
        "in: during the backward pass; all else comes after it"
    )
    return result


def prediction_cells(k: int, size: float, network: Network) -> list[str]:
    plain, cost = plain_seconds(k, size, network), gaf_seconds(k, size, network)
    m = micro_group_for(k)
    grouped = gaf_seconds(k, size, network, m).total()
    return [
        str(k),
        format_ms(plain),
        format_ms(cost.total()),
        f"{cost.total() / plain:.3g}",
        format_ms(cost.way_in),
        format_ms(cost.scalars),
        format_ms(cost.gram),
        format_ms(cost.way_out),
        str(m),
        format_ms(grouped),
        f"{grouped / plain:.3g}",
    ]


def format_ms(seconds: float) -> str:
    value = 1000 * seconds
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"


def read_points(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Conditions and points of what `gaf bench ddp --out` or benchmarks/slow_network.py wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [
        line for line in lines if line.get("kind") == "bench-ddp" and line["way"] in (PLAIN, GAF)
    ]
    if not points or lines[0].get("kind") != "conditions":
        raise ValueError(
            f"results file {path}: must hold lines of gaf bench ddp; it has none. "
            f"Write one with gaf bench ddp --out {path}."
        )
    return lines[0], points


def measured_table(points: Sequence[dict[str, Any]], network: Network) -> Table:
    """Predicted and measured: time of the aggregation alone, and bytes sent, if a file has them."""
    result = Table(title="Predicted and measured", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("k", "way", "ms", "measured", "off", "MB", "counted", "wire", "off"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for point in points:
        result.add_row(*point_cells(point, network))
    result.caption = (
        "the aggregation alone; MB that a rank sends per step\noff: measured over predicted"
    )
    return result


def point_cells(point: dict[str, Any], network: Network) -> list[str]:
    seconds, size = predict_point(point, network)
    measured, wire = point["alone_ms_median"] / 1000, point["wire_bytes"]
    return [
        str(point["k"]),
        point["way"],
        format_ms(seconds),
        format_ms(measured),
        format_excess(measured / seconds),
        f"{size / 1e6:.2f}",
        f"{point['sent_bytes'] / 1e6:.2f}",
        "-" if wire is None else f"{wire / 1e6:.2f}",
        "-" if wire is None else format_excess(wire / size),
    ]


def format_excess(ratio: float) -> str:
    """+8% for 1.08."""
    return f"{100 * (ratio - 1):+.0f}%"


def predict_point(point: dict[str, Any], network: Network) -> tuple[float, float]:
    """Seconds of the aggregation and bytes sent for a measured way and k."""
    k, size = point["k"], point["gradient_bytes"]
    if point["way"] == PLAIN:
        return plain_seconds(k, size, network), ring_all_reduce(size, k)
    return gaf_seconds(k, size, network).total(), gaf_bytes(k, size)


def fitted_beta(points: Sequence[dict[str, Any]], alpha: float) -> float:
    """Bytes per second that explain plain DDP's measured all-reduces, the median over k."""
    found: list[float] = []
    for point in points:
        if point["way"] == PLAIN:
            seconds = point["alone_ms_median"] / 1000 - 2 * (point["k"] - 1) * alpha
            found.append(ring_all_reduce(point["gradient_bytes"], point["k"]) / max(seconds, 1e-9))
    return statistics.median(found)
