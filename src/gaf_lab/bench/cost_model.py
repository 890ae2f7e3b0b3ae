"""What a step's communication should cost: latency, bandwidth and bytes, from 2 to 4,096 ranks.

    ring all-reduce    2 (k-1) alpha  +  2 n s (k-1)/k / beta
    GAF, in              (k-1) alpha  +    n s (k-1)/k / beta         all-to-all
         scalars         (k-1) alpha  +  (k-1) (r r + 2) 8 / beta     all-gather, up to 32 ranks
                       2 (k-1) alpha  +  2 (r r + 2) 8 (k-1)/k / beta beyond: all-to-all and all-gather
         Gram            r n/k s / memory  +  2 r r n/k / flops       one product; without flops, the upper bound
                       r (r+1)/2 2 n/k s / memory                     of a product for each pair, both rows from memory
         out             (k-1) alpha  +    n s (k-1)/k / beta         all-gather; not after a skip
    two ranks          the all-reduce, the scalars, and 2 n s / memory for two inner products; no way out

n coordinates of s bytes, k ranks, r = k/m rows, alpha seconds a message, beta bytes a second that a rank sends. Every
collective is charged k-1 messages one after the other, as around a ring. An all-to-all's messages do not wait for each other, so its
(k-1) alpha is an upper bound; log2(k) alpha can do for small messages, at more bytes.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gaf.ranks.messages import FEW
from gaf_lab.bench.bytes_sent import all_gather, all_to_all, ring_all_reduce
from gaf_lab.bench.ways import GAF, PLAIN

KS = tuple(2**i for i in range(1, 13))
SCALAR = 8  # bytes of a float64
# scalars that travel with K: the scaler's factor, and whether an old update was still there
BESIDE = 2


@dataclass(frozen=True)
class Network:
    """alpha: seconds per message; beta, memory: bytes per second that a rank sends, and reads from memory; flops: operations
    per second of a matrix product, None where the pairs are multiplied one by one."""

    alpha: float
    beta: float
    memory: float
    flops: float | None = None


@dataclass(frozen=True)
class Cost:
    """Seconds of each part of a step's aggregation by GAF; all but `way_in` come after the backward pass."""

    way_in: float
    scalars: float
    gram: float
    way_out: float

    def total(self) -> float:
        return self.way_in + self.scalars + self.gram + self.way_out


def plain_seconds(k: int, size: float, network: Network) -> float:
    """A ring all-reduce of `size` bytes."""
    return 2 * (k - 1) * network.alpha + ring_all_reduce(size, k) / network.beta


def gaf_seconds(k: int, size: float, network: Network, micro_group: int = 1) -> Cost:
    """GAF over `size` bytes of gradient on each of k ranks, with k / micro_group rows."""
    rows = k // micro_group
    if rows == k == 2:
        return Cost(
            plain_seconds(k, size, network),
            network.alpha + scalar_bytes(k, rows) / network.beta,
            2 * size / network.memory,
            0.0,
        )
    half = (k - 1) * network.alpha + all_to_all(size, k) / network.beta
    latency = (1 if k <= FEW else 2) * (k - 1) * network.alpha
    return Cost(
        half,
        latency + scalar_bytes(k, rows) / network.beta,
        gram_seconds(rows, size / k, network),
        half,
    )


def gram_seconds(rows: int, slice_size: float, network: Network, coordinate: int = 4) -> float:
    """The Gram matrix of `rows` slices of `slice_size` bytes, a coordinate of which has `coordinate` bytes."""
    if network.flops is None:
        return rows * (rows + 1) / 2 * 2 * slice_size / network.memory
    return (
        rows * slice_size / network.memory
        + 2 * rows * rows * slice_size / coordinate / network.flops
    )


def scalar_bytes(k: int, rows: int) -> float:
    """Bytes that a rank sends of K: all of it to everyone among few ranks, else a block in and a block out."""
    size = SCALAR * (rows * rows + BESIDE)
    return all_gather(size, k) if k <= FEW else ring_all_reduce(size, k)


def gaf_bytes(k: int, size: float, micro_group: int = 1) -> float:
    """Bytes that a rank sends in a step that is taken."""
    return 2 * all_to_all(size, k) + scalar_bytes(k, k // micro_group)


def micro_group_for(k: int) -> int:
    """The smallest power of two that leaves at most 32 rows."""
    m = 1
    while k // m > FEW:
        m *= 2
    return m


def table(size: float, network: Network, ks: Sequence[int] = KS) -> Table:
    """Milliseconds for every k: all-reduce, GAF and its parts, and GAF with at most 32 rows."""
    result = Table(
        title="Predicted milliseconds of a step's aggregation",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "k",
        "all-reduce",
        "GAF",
        "ratio",
        "in",
        "scalars",
        "Gram",
        "out",
        "m",
        "GAF m",
        "ratio",
    ):
        result.add_column(column, justify="right", no_wrap=True)
    for k in ks:
        plain, cost, m = (
            plain_seconds(k, size, network),
            gaf_seconds(k, size, network),
            micro_group_for(k),
        )
        grouped = gaf_seconds(k, size, network, m).total()
        parts = (cost.way_in, cost.scalars, cost.gram, cost.way_out)
        ours, theirs = (
            (ms(cost.total()), f"{cost.total() / plain:.3g}"),
            (ms(grouped), f"{grouped / plain:.3g}"),
        )
        result.add_row(str(k), ms(plain), *ours, *map(ms, parts), str(m), *theirs)
    result.caption = "GAF m: micro_group, m ranks whose average is a row\nin: during the backward pass; all else comes after it"
    return result


def ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------- against measurements


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Conditions and points of what `gaf bench ddp --out` or benchmarks/slow_network.py wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [
        line for line in lines if line.get("kind") == "bench-ddp" and line["way"] in (PLAIN, GAF)
    ]
    if not points or lines[0].get("kind") != "conditions":
        raise ValueError(
            f"results file {path}: must hold lines of gaf bench ddp; it has none. Write one with gaf bench ddp --out {path}."
        )
    return lines[0], points


def against(points: Sequence[dict[str, Any]], network: Network) -> Table:
    """Predicted and measured time of the aggregation alone, and bytes sent, where a file has them."""
    result = Table(title="Predicted and measured", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("k", "way", "ms", "measured", "off", "MB", "counted", "wire", "off"):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for point in points:
        seconds, size = predicted(point, network)
        measured, wire = point["alone_ms_median"], point["wire_bytes"]
        times = (ms(seconds), ms(measured / 1000), percent(measured / 1000 / seconds))
        seen = ("-", "-") if wire is None else (f"{wire / 1e6:.2f}", percent(wire / size))
        result.add_row(
            str(point["k"]),
            point["way"],
            *times,
            f"{size / 1e6:.2f}",
            f"{point['sent_bytes'] / 1e6:.2f}",
            *seen,
        )
    result.caption = (
        "the aggregation alone; MB that a rank sends per step\noff: measured over predicted"
    )
    return result


def predicted(point: dict[str, Any], network: Network) -> tuple[float, float]:
    """Seconds of the aggregation and bytes sent for a measured way and k."""
    k, size = point["k"], point["gradient_bytes"]
    if point["way"] == PLAIN:
        return plain_seconds(k, size, network), ring_all_reduce(size, k)
    return gaf_seconds(k, size, network).total(), gaf_bytes(k, size)


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f}%"


def fitted_beta(points: Sequence[dict[str, Any]], alpha: float) -> float:
    """Bytes per second at which plain DDP's measured all-reduces come out right, the median over k."""
    found: list[float] = []
    for point in points:
        if point["way"] == PLAIN:
            seconds = point["alone_ms_median"] / 1000 - 2 * (point["k"] - 1) * alpha
            found.append(ring_all_reduce(point["gradient_bytes"], point["k"]) / max(seconds, 1e-9))
    return statistics.median(found)
