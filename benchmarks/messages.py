"""The way in and out between gloo processes: gloo's collectives against point-to-point messages.

    .venv/bin/python benchmarks/messages.py --k 2 4 8 --out benchmarks/messages.jsonl
    sudo .venv/bin/python benchmarks/messages.py --k 2 4 --mbit 1000 --out benchmarks/messages.jsonl

The messages have pre-posted receives. The vector has ResNet18's size, in three pieces; the values
are medians of rounds in which the ways alternate. With --mbit each process has a network namespace
behind a limited link, as in slow_network.py. Lines are appended to the file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import slow_network
import torch
import torch.distributed as dist
from torch import Tensor

from gaf.ranks import messages
from gaf_lab.records import environment

COORDINATES = 11_227_812
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--mbit",
        type=float,
        help="megabits per second of each link; without it, the loopback interface",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for k in options.k:
        if options.mbit is None:
            found = started(k, [[] for _ in range(k)], "127.0.0.1", {})
        else:
            slow_network.check_machine()
            with slow_network.network(k, options.mbit) as names:
                inside = [["ip", "netns", "exec", name] for name in names]
                found = started(
                    k,
                    inside,
                    f"{slow_network.NETWORK}.1",
                    {"GLOO_SOCKET_IFNAME": slow_network.DEVICE},
                )
        line = {
            "k": k,
            "mbit": options.mbit,
            "rounds": ROUNDS,
            "coordinates": COORDINATES,
            "ms_median": found,
        }
        line |= {
            "versions": environment.versions(),
            "machine": environment.machine(torch.device("cpu")),
            "commit": environment.commit(),
        }
        print(k, found)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


def started(
    k: int, prefixes: list[list[str]], address: str, more: dict[str, str]
) -> dict[str, float]:
    shared = (
        os.environ
        | more
        | {
            "WORLD_SIZE": str(k),
            "MASTER_ADDR": address,
            "MASTER_PORT": "29581",
            "MESSAGES_RANK": "1",
        }
    )
    ranks = [
        subprocess.Popen(
            [*prefix, sys.executable, __file__],
            env=shared | {"RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r, prefix in enumerate(prefixes)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    return json.loads(said[0])  # type: ignore[no-any-return]


def rank_main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    k, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    pieces = [
        piece[: len(piece) // k * k].view(k, -1) for piece in torch.randn(COORDINATES).chunk(3)
    ]
    slices = [torch.empty_like(piece) for piece in pieces]
    mine = dist.get_rank()
    ways: dict[str, Callable[[int, Tensor, Tensor], list]] = {
        "all-reduce": lambda i, p, s: [dist.all_reduce(p, async_op=True)],
        "in: all_to_all_single": lambda i, p, s: [
            dist.all_to_all_single(s.view(-1), p.view(-1), async_op=True)
        ],
        "in: messages": lambda i, p, s: messages.all_to_all(s, p, group, i),
        "out: all_gather_into_tensor": lambda i, p, s: [
            messages._all_gather(p.view(-1), p[mine], async_op=True)
        ],
        "out: broadcasts": lambda i, p, s: [
            dist.broadcast(p[r], r, async_op=True) for r in range(k)
        ],
        "out: messages": lambda i, p, s: messages.all_gather(p, group, i),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, start in ways.items():
            dist.barrier()
            began = time.perf_counter()
            for work in [
                work
                for i, (p, s) in enumerate(zip(pieces, slices, strict=True))
                for work in start(i, p, s)
            ]:
                work.wait()
            dist.barrier()
            taken[name].append(1e3 * (time.perf_counter() - began))
            for piece in pieces:
                piece.normal_()
    if mine == 0:
        print(
            json.dumps(
                {name: round(statistics.median(times[1:]), 1) for name, times in taken.items()}
            )
        )


if __name__ == "__main__":
    rank_main() if "MESSAGES_RANK" in os.environ else main()
