"""What a row's arithmetic takes on one CPU thread, beside other ways to compute the same.

    .venv/bin/python benchmarks/products.py --out benchmarks/products.jsonl

Rows are white noise: the gradient of the mlp 784-512-512-10, or one rank's slices of ResNet18's
among four ranks. Every way is timed once in each round, in CPU time of the thread. Errors of K are
relative to |g_i| |g_j|.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf.rules.blas import gram_by_blas, gram_of_by_blas, products_by_blas
from gaf.rules.combine import combine_into, weighted_sum
from gaf.rules.gram import gram
from gaf_lab.records import environment

MLP, RESNET18 = 669_706, 11_227_812
BLOCK = 2**16  # coordinates of a row that stay in cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/products.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    conditions = {
        "kind": "conditions",
        "rounds": options.rounds,
        "versions": environment.versions(),
        "machine": environment.machine(torch.device("cpu")),
        "load": os.getloadavg()[0],
        "commit": environment.commit(),
    }
    lines = [conditions, *measure(torch.randn(8, MLP), "mlp", options.rounds)]
    lines += measure(torch.randn(4, RESNET18 // 4), "resnet18, a rank of 4", options.rounds)
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines[1:]:
        print(f"{line['rows']:22} {line['way']:44} {line['ms_median']:7.3f} ms  {line['error']}")


def measure(rows: Tensor, name: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each way; the first round is not counted."""
    ways, exact = ways_on(rows), gram(rows)
    scale = exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, run in ways.items():
            started = time.thread_time()
            run()
            times[way].append(1000 * (time.thread_time() - started))
    found = []
    for way, run in ways.items():
        error = ((run() - exact).abs() / scale).max().item() if way.startswith("K") else None
        ms = statistics.median(times[way][1:])
        line = {"kind": "products", "rows": name, "way": way, "ms_median": ms, "error": error}
        found.append(line)
    return found


def ways_on(rows: Tensor) -> dict[str, Callable[[], Any]]:
    s, g, total, spare = rows[0].clone(), rows[1].clone(), rows[2].clone(), rows.clone()
    weights = [1 / len(rows)] * len(rows)

    def in_blocks() -> None:
        for out, part in zip(total.split(BLOCK), rows.split(BLOCK, dim=1), strict=True):
            combine_into(out, part, weights)

    return {
        "one row: add to the sum": lambda: s.add_(g, alpha=1e-9),
        "one row: two dot products": lambda: products_by_blas(s, g),
        "one row: products of pieces of 512": lambda: batched_products(s, g),
        "K of a list of rows": lambda: gram_of_by_blas([[row] for row in rows]),
        "K of a matrix of rows": lambda: gram_by_blas(rows),
        "K by matrix times vector": lambda: by_vectors(rows, rows.shape[1]),
        "K by matrix times vector, 8,192 at a time": lambda: by_vectors(rows, 2**13),
        "sum: rounded twice": lambda: weighted_sum(list(zip(spare, weights, strict=True))),
        "sum: rounded once": lambda: combine_into(total, rows, weights),
        "sum: rounded once, in blocks": in_blocks,
    }


def batched_products(s: Tensor, g: Tensor) -> tuple[float, float]:
    whole = len(g) // 512 * 512
    a, b = (v[:whole].view(-1, 1, 512) for v in (s, g))
    inner, own = (torch.bmm(v, b.mT).sum(dtype=torch.float64).item() for v in (a, b))
    return inner, own


def by_vectors(rows: Tensor, length: int) -> Tensor:
    """K, a row of its lower half at a time, in float32 over `length` coordinates."""
    lower = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.split(length, dim=1):
        for i, row in enumerate(block):
            lower[i, : i + 1] += block[: i + 1] @ row
    return lower + lower.tril(-1).T


if __name__ == "__main__":
    main()
