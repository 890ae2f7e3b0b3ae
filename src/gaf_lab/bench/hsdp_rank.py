"""One rank's part of `gaf bench hsdp`: times every way in turn, or finds one way's peak of memory.

`python -m gaf_lab.bench.hsdp_rank OPTIONS RESULT` is one rank. It finds the others as torchrun's
processes do, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gaf_lab.bench.bytes_sent import counting
from gaf_lab.bench.ddp_rank import PEAK_STEPS, UNCOUNTED_STEPS
from gaf_lab.bench.hsdp_ways import HSDP_WAYS, HSDPSetup, make_mesh, make_sharded_step
from gaf_lab.bench.launch import measure_on_rank
from gaf_lab.bench.memory import give_back_freed_memory, process_bytes
from gaf_lab.bench.timing import StepFunction, StepTime, rotate

HSDP_ROUNDS = 10  # with the same models, as in ddp_rank


def hsdp_rank_main(setup: HSDPSetup, result: Path) -> None:
    """One rank's part of `gaf bench hsdp`."""
    measure_on_rank(partial(sharded_times if setup.peak is None else sharded_peak, setup), result)


def sharded_times(setup: HSDPSetup) -> dict[str, Any]:
    """Everything but the memory, of every way."""
    mesh = make_mesh(setup)
    found: dict[str, list[StepTime]] = {way: [] for way in HSDP_WAYS}
    sent: dict[str, dict[str, float]] = {}
    shard_bytes = 0
    for done in range(0, setup.rounds, HSDP_ROUNDS):
        gc.collect()  # earlier models are in reference cycles
        made = {way: make_sharded_step(way, setup, mesh) for way in HSDP_WAYS}
        steps = {way: step for way, (step, _) in made.items()}
        warm_up(steps)
        params = made[HSDP_WAYS[0]][1].parameters()
        shard_bytes = sum(4 * p.to_local().numel() for p in params)
        sent = sent or {way: sent_between(step, mesh) for way, step in steps.items()}
        for number in range(done, min(done + HSDP_ROUNDS, setup.rounds)):
            for way in rotate(HSDP_WAYS, number):
                found[way].append(time_of_ranks(steps[way]))
        del made, steps
    return {"shard_bytes": shard_bytes, "sent": sent, "times": found}


def time_of_ranks(step: StepFunction) -> StepTime:
    """Milliseconds until the last rank has finished, and of the CPU for a rank on average."""
    dist.barrier()
    began, cpu_began = time.perf_counter(), time.process_time()
    step()
    dist.barrier()
    wall = 1000 * (time.perf_counter() - began)
    cpu = torch.tensor(1000 * (time.process_time() - cpu_began), dtype=torch.float64)
    dist.all_reduce(cpu)
    return StepTime(wall, float(cpu) / dist.get_world_size())


def warm_up(steps: dict[str, StepFunction]) -> None:
    for step in steps.values():
        for _ in range(UNCOUNTED_STEPS):
            step()


def sent_between(step: StepFunction, mesh: Any) -> dict[str, float]:
    """Bytes that this rank sends to the other replicas in a step, by collective."""
    group = mesh["replicate"].get_group()
    with counting(dist.get_world_size(group), group) as counter:
        step()
    return dict(counter)


def sharded_peak(setup: HSDPSetup) -> dict[str, Any]:
    """The highest rank's peak in bytes, beyond what its process held before it had a model."""
    assert setup.peak is not None
    mesh = make_mesh(setup)
    give_back_freed_memory()
    before = process_bytes("VmRSS")
    step, _ = make_sharded_step(setup.peak, setup, mesh)
    for _ in range(PEAK_STEPS + 1):  # gaf sends during the pass from the third one on
        step()
    most = torch.tensor(process_bytes("VmHWM") - before)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {"peak_bytes": int(most) if before else None}


if __name__ == "__main__":
    hsdp_rank_main(HSDPSetup(**json.loads(sys.argv[1])), Path(sys.argv[2]))
