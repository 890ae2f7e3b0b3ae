"""What filtering costs among processes: plain DDP, gaf.attach and gathering every gradient, alternating in one run.

Every figure is from the slowest rank, and a ratio is to plain DDP in the same round. `python -m gaf_lab.bench.ddp` is one
rank; it finds the others as torchrun's processes do, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich import box
from rich.table import Table
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from gaf_lab.bench.bytes_sent import counting, interface_bytes, ring_all_reduce, volume
from gaf_lab.bench.ways import PLAIN, WAYS, Step, build, make_aggregate, make_step
from gaf_lab.progress import Tell, silent
from gaf_lab.settings.fields import ModelName
from gaf_lab.training import models

FRESH = 10  # rounds with the same models: where they lie in memory moves times by some percent
# steps that are not counted: DDP changes its buckets after the first, buffers are kept from the second on
WARM = 3
WIRE_STEPS = 5  # steps between two readings of the interface's counter
PEAK_STEPS = 3


@dataclass(frozen=True)
class Options:
    """A benchmark's conditions, the same on every rank; `peak` names the way whose memory is wanted instead of times."""

    model: ModelName = "resnet18"
    stem: models.Stem = "imagenet"
    b: int = 32
    rounds: int = 20
    peak: str | None = None


@dataclass(frozen=True)
class Measured:
    """One way at one k: milliseconds by rounds, of a step and of its aggregation alone; bytes and memory of a rank."""

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
            "kind": "bench-ddp", "way": self.way, "k": self.k, "rounds": len(self.ms), "gradient_bytes": self.gradient_bytes,
            **spread("", self.ms, self.plain_ms), **spread("alone_", self.alone_ms, self.plain_alone_ms),
            "sent_bytes": sum(self.sent.values()), "sent": self.sent, "wire_bytes": self.wire_bytes,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20, "extra_gradients": self.extra_gradients(),
        }  # fmt: skip

    def extra_gradients(self) -> float | None:
        if self.peak_bytes is None or self.plain_peak_bytes is None:
            return None
        return (self.peak_bytes - self.plain_peak_bytes) / self.gradient_bytes


def spread(prefix: str, ours: list[float], plain: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=10, method="inclusive")
    found = {
        "ms_median": statistics.median(ours),
        "ratio_median": statistics.median(ratios),
        "ratio_p10": low,
        "ratio_p90": high,
    }
    return {prefix + name: value for name, value in found.items()}


# ---------------------------------------------------------------------------------------------- one rank


def rank_main(options: Options, result: Path) -> None:
    """One rank's part, as the environment says which; rank 0 writes what was found to `result` as JSON."""
    torch.set_num_threads(1)
    # tau accepts everything: that is the benchmark
    warnings.filterwarnings("ignore", message="gaf:")
    dist.init_process_group("gloo")
    try:
        found = peak(options) if options.peak is not None else times(options)
        if dist.get_rank() == 0:
            result.write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def times(options: Options) -> dict[str, Any]:
    """Everything but the memory, of every way."""
    ways, model = make_steps(options)
    sizes = bucket_sizes(model)
    sent = {way: sent_bytes(way, step, sizes) for way, step in ways.items()}
    wire = {way: wire_bytes(step) for way, step in ways.items()}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    while True:
        alternate(ways, found, min(FRESH, options.rounds - len(found[PLAIN])))
        if len(found[PLAIN]) == options.rounds:
            break
        del ways, model
        ways, model = make_steps(options)
    alone = alone_times(sizes, options.rounds)
    return {
        "gradient_bytes": 4 * sum(sizes),
        "sent": sent,
        "wire_bytes": wire,
        "ms": found,
        "alone_ms": alone,
    }


def make_steps(options: Options) -> tuple[dict[str, Step], torch.nn.Module]:
    """A step of each way, warm, and plain DDP's model."""
    gc.collect()  # those before are in cycles
    made = {way: make_step(way, options.model, options.stem, options.b) for way in WAYS}
    for step, _ in made.values():
        for _ in range(WARM):
            step()
    return {way: step for way, (step, _) in made.items()}, made[PLAIN][1]


def alternate(steps: dict[str, Step], found: dict[str, list[float]], rounds: int) -> None:
    """Adds `rounds` times of each; the one that begins changes from round to round."""
    for number in range(rounds):
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            found[way].append(timed(steps[way]))


def timed(step: Step) -> float:
    """Milliseconds until the last rank is through."""
    dist.barrier()
    started = time.perf_counter()
    step()
    dist.barrier()
    return 1000 * (time.perf_counter() - started)


def alone_times(sizes: list[int], rounds: int) -> dict[str, list[float]]:
    """Of the aggregation without a step around it, on tensors as large as DDP's buckets."""
    own = [torch.randn(n, generator=torch.Generator().manual_seed(dist.get_rank())) for n in sizes]
    buckets = [torch.empty_like(flat) for flat in own]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    ways = {way: make_aggregate(way) for way in WAYS}

    def refilled(way: str) -> float:
        for bucket, flat in zip(buckets, own, strict=True):
            bucket.copy_(flat)
        return timed(lambda: ways[way](buckets))

    for number in range(-1, rounds):  # the first round is not counted
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            found[way].append(refilled(way))
    return {way: values[1:] for way, values in found.items()}


def sent_bytes(way: str, step: Step, sizes: list[int]) -> dict[str, float]:
    """Bytes that this rank sends in a step, by collective."""
    k = dist.get_world_size()
    with counting(k) as counter:
        step()
    if way == PLAIN:  # DDP calls it in C++, bucket by bucket
        counter["all_reduce"] += ring_all_reduce(4 * sum(sizes), k)  # type: ignore[assignment]
    return dict(counter)


def bucket_sizes(model: torch.nn.Module) -> list[int]:
    """Coordinates in each bucket, as DDP has cut them after its first step."""
    assert isinstance(model, DistributedDataParallel)
    data = model._get_ddp_logging_data()
    told = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
    return [int(size) // 4 for size in str(told).split(",")]


def wire_bytes(step: Step) -> float | None:
    """Bytes per rank and step at the interface, headers included, mean over the ranks; None where the system does not count."""
    dist.barrier()
    before = interface_bytes()
    dist.barrier()
    for _ in range(WIRE_STEPS):
        step()
    dist.barrier()
    after = interface_bytes()
    if before is None or after is None:
        return None
    mean = torch.tensor((after - before) / WIRE_STEPS / dist.get_world_size(), dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean)


def peak(options: Options) -> dict[str, Any]:
    """The most memory that a rank's process held beyond what it held before there was a model; the highest rank's."""
    assert options.peak is not None
    give_back_freed_memory()
    before = memory("VmRSS")
    step, _ = make_step(options.peak, options.model, options.stem, options.b)
    for _ in range(PEAK_STEPS):
        step()
    most = torch.tensor(memory("VmHWM") - before)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {"peak_bytes": int(most) if before else None}


def give_back_freed_memory() -> None:
    """Makes glibc give back every large block at once; it would keep some, by their history, and peaks would differ from run to run."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, its default, but fixed


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most there were; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


# ---------------------------------------------------------------------------------------------- all ranks of this machine


def run(options: Options, ks: tuple[int, ...], tell: Tell = silent) -> list[Measured]:
    """Measures every way among k processes of this machine, for every k. tell: how far it is."""
    check(options, ks)
    # torch is imported once, not by each process
    torch.multiprocessing.set_forkserver_preload([__name__])
    found = []
    for k in ks:
        tell(f"k = {k}, times", 0, 1 + len(WAYS))
        result, peaks = spawned(options, k), {}
        for number, way in enumerate(WAYS, 1):
            tell(f"k = {k}, memory", number, 1 + len(WAYS))
            peaks[way] = spawned(dataclasses.replace(options, peak=way), k)["peak_bytes"]
        found += measured(k, result, peaks)
    return found


def check(options: Options, ks: tuple[int, ...]) -> None:
    if options.rounds < 2:
        raise ValueError(
            f"rounds: must be at least 2, for a spread; got {options.rounds}. Give --rounds 20."
        )
    if options.b < 2:
        raise ValueError(f"b: must be at least 2, for BatchNorm; got {options.b}. Give --b 32.")
    if not ks or min(ks) < 2:
        raise ValueError(
            f"k: must be at least 2 processes; got {', '.join(map(str, ks)) or 'none'}. Give --k 2 4."
        )


def spawned(options: Options, k: int) -> dict[str, Any]:
    """What rank 0 of k processes found."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        start_processes(
            spawned_rank, (k, free_port(), options, result), nprocs=k, start_method="forkserver"
        )
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def spawned_rank(rank: int, k: int, port: int, options: Options, result: Path) -> None:
    os.environ.update(environment_of(rank, k, "127.0.0.1", port, local=k))
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rank_main(options, result)


def environment_of(rank: int, k: int, address: str, port: int, local: int) -> dict[str, str]:
    """What tells a process which rank it is: torchrun's names. `local` ranks share its machine."""
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": k,
        "LOCAL_WORLD_SIZE": local,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return {"MASTER_ADDR": address} | {name: str(value) for name, value in numbers.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def measured(k: int, result: dict[str, Any], peaks: dict[str, int | None]) -> list[Measured]:
    times, alone = result["ms"], result["alone_ms"]
    return [
        Measured(
            way, k, result["gradient_bytes"], times[way], times[PLAIN], alone[way], alone[PLAIN],
            result["sent"][way], result["wire_bytes"][way], peaks.get(way), peaks.get(PLAIN),
        )
        for way in WAYS
    ]  # fmt: skip


def conditions(options: Options) -> dict[str, Any]:
    bare = build(options.model, options.stem)
    plain = {name: value for name, value in dataclasses.asdict(options).items() if name != "peak"}
    return plain | {
        "pictures": "3x32x32",
        "parameters": sum(p.numel() for p in bare.parameters()),
        "buffer_bytes": volume(*bare.buffers()),
    }


def table(found: list[Measured]) -> Table:
    result = Table(
        title="A step among k processes against plain DDP in the same round",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "k",
        "way",
        "ms",
        "ratio",
        "10-90%",
        "alone",
        "ratio",
        "sent",
        "wire",
        "gradients",
    ):
        result.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for line in (m.line() for m in found):
        result.add_row(str(line["k"]), line["way"], *cells(line))
    result.caption = (
        "medians; alone: the aggregation without the pass\nsent: MB per rank and step, counted; wire: at the interface\n"
        "gradients: held beyond plain DDP at the peak"
    )
    return result


def cells(line: dict[str, Any]) -> list[str]:
    extra, wire_bytes = line["extra_gradients"], line["wire_bytes"]
    return [
        f"{line['ms_median']:.0f}", f"{line['ratio_median']:.3f}", f"{line['ratio_p10']:.2f}-{line['ratio_p90']:.2f}",
        f"{line['alone_ms_median']:.0f}", f"{line['alone_ratio_median']:.2f}", f"{line['sent_bytes'] / 1e6:.1f}",
        "-" if wire_bytes is None else f"{wire_bytes / 1e6:.1f}", "-" if extra is None else f"{extra:+.2f}",
    ]  # fmt: skip


if __name__ == "__main__":
    rank_main(Options(**json.loads(sys.argv[1])), Path(sys.argv[2]))
