"""One rank's part of `gaf bench ddp`: times every way in turn, or finds one way's peak of memory.

`python -m gaf_lab.bench.ddp_rank OPTIONS RESULT` is one rank. It finds the others as torchrun's
processes do, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import gc
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gaf_lab.bench.bytes_sent import counting, interface_bytes, ring_all_reduce
from gaf_lab.bench.launch import measure_on_rank
from gaf_lab.bench.memory import give_back_freed_memory, process_bytes
from gaf_lab.bench.timing import rotate
from gaf_lab.bench.ways import (
    PERIODS,
    PLAIN,
    WAYS,
    Step,
    make_aggregate,
    make_rank_step,
    mean_step,
)
from gaf_lab.settings.choices import ModelName
from gaf_lab.training import models

DDP_ROUNDS = 4  # with the same models: their places in memory move times by some percent
# Not counted: DDP changes its buckets after the first step, buffers are kept from the second on.
UNCOUNTED_STEPS = 3
WIRE_STEPS = 5  # steps between two readings of the interface's counter
PEAK_STEPS = 3


@dataclass(frozen=True)
class DDPSetup:
    """The same on every rank. peak: the way whose peak of memory is measured, instead of times."""

    model: ModelName = "resnet18"
    stem: models.Stem = "imagenet"
    b: int = 32
    rounds: int = 20
    peak: str | None = None
    ways: tuple[str, ...] = WAYS


def rank_main(setup: DDPSetup, result: Path) -> None:
    """One rank's part of `gaf bench ddp`."""
    measure_on_rank(partial(measure_times if setup.peak is None else measure_peak, setup), result)


def measure_times(setup: DDPSetup) -> dict[str, Any]:
    """Everything but the memory, of every way."""
    ways, model = make_warm_steps(setup)
    sizes = bucket_sizes(model)
    sent = {way: sent_bytes(way, step, sizes) for way, step in ways.items()}
    wire = {way: wire_bytes(way, step) for way, step in ways.items()}
    found: dict[str, list[float]] = {way: [] for way in setup.ways}
    while True:
        time_ways(ways, found, min(DDP_ROUNDS, setup.rounds - len(found[PLAIN])))
        if len(found[PLAIN]) == setup.rounds:
            break
        del ways, model
        ways, model = make_warm_steps(setup)
    alone = alone_times(sizes, setup.rounds, setup.ways)
    return {
        "gradient_bytes": 4 * sum(sizes),
        "sent": sent,
        "wire_bytes": wire,
        "ms": found,
        "alone_ms": alone,
    }


def make_warm_steps(setup: DDPSetup) -> tuple[dict[str, Step], torch.nn.Module]:
    """A step of each way, after the uncounted ones, and plain DDP's model."""
    gc.collect()  # earlier models are in reference cycles
    made = {way: make_rank_step(way, setup.model, setup.stem, setup.b) for way in setup.ways}
    for step, _ in made.values():
        for _ in range(UNCOUNTED_STEPS):
            step()
    return {way: step for way, (step, _) in made.items()}, made[PLAIN][1]


def time_ways(steps: dict[str, Step], found: dict[str, list[float]], rounds: int) -> None:
    """Adds `rounds` times of each; the way that begins changes from round to round."""
    for number in range(rounds):
        for way in rotate(tuple(steps), number):
            found[way].append(mean_step(way, partial(time_until_last, steps[way])))


def time_until_last(step: Step, measured: bool) -> float:
    """Milliseconds until the last rank has finished. measured: for a way with a period."""
    dist.barrier()
    started = time.perf_counter()
    step(measured)
    dist.barrier()
    return 1000 * (time.perf_counter() - started)


def alone_times(
    sizes: list[int], rounds: int, wanted: tuple[str, ...] = WAYS
) -> dict[str, list[float]]:
    """Milliseconds of the aggregation alone, on tensors as large as DDP's buckets."""
    own = [torch.randn(n, generator=torch.Generator().manual_seed(dist.get_rank())) for n in sizes]
    buckets = [torch.empty_like(flat) for flat in own]
    found: dict[str, list[float]] = {way: [] for way in wanted}
    ways = {way: make_aggregate(way) for way in wanted}

    def time_refilled(way: str, measured: bool) -> float:
        for bucket, flat in zip(buckets, own, strict=True):
            bucket.copy_(flat)
        return time_until_last(partial(ways[way], buckets), measured)

    for number in range(-1, rounds):  # the first round is not counted
        for way in rotate(wanted, number):
            found[way].append(mean_step(way, partial(time_refilled, way)))
    return {way: values[1:] for way, values in found.items()}


def sent_bytes(way: str, step: Step, sizes: list[int]) -> dict[str, float]:
    """Bytes that this rank sends in a step on average, by collective."""
    k = dist.get_world_size()
    found: Counter[str] = Counter()
    shares = {True: 1, False: PERIODS[way] - 1} if way in PERIODS else {True: 1}
    for measured, share in shares.items():
        with counting(k) as counter:
            step(measured)
        for name, size in counter.items():
            found[name] += share * size
    if way == PLAIN:  # DDP calls it in C++, bucket by bucket
        found["all_reduce"] += ring_all_reduce(4 * sum(sizes), k)  # type: ignore[assignment]
    return {name: size / sum(shares.values()) for name, size in found.items()}


def bucket_sizes(model: torch.nn.Module) -> list[int]:
    """Coordinates in each of DDP's buckets, as they are after its first step."""
    assert isinstance(model, DistributedDataParallel)
    data = model._get_ddp_logging_data()
    sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
    return [int(size) // 4 for size in str(sizes).split(",")]


def wire_bytes(way: str, step: Step) -> float | None:
    """Bytes per rank and step at the interface, headers included; None if there is no counter."""
    if interface_bytes() is None:
        return None
    return mean_step(way, partial(wire_bytes_of_steps, step))


def wire_bytes_of_steps(step: Step, measured: bool) -> float:
    dist.barrier()
    before = interface_bytes()
    dist.barrier()
    for _ in range(WIRE_STEPS):
        step(measured)
    dist.barrier()
    after = interface_bytes()
    assert before is not None
    assert after is not None
    mean = torch.tensor((after - before) / WIRE_STEPS / dist.get_world_size(), dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean)


def measure_peak(setup: DDPSetup) -> dict[str, Any]:
    """The highest rank's peak in bytes, beyond what its process held before it had a model."""
    assert setup.peak is not None
    give_back_freed_memory()
    before = process_bytes("VmRSS")
    step, _ = make_rank_step(setup.peak, setup.model, setup.stem, setup.b)
    for _ in range(PEAK_STEPS):
        step()
    most = torch.tensor(process_bytes("VmHWM") - before)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {"peak_bytes": int(most) if before else None}


if __name__ == "__main__":
    rank_main(DDPSetup(**json.loads(sys.argv[1])), Path(sys.argv[2]))
