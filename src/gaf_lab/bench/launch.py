"""The ranks of a benchmark: starts them on this machine, and frames what each measures."""

import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing.spawn import start_processes

RankMain = Callable[[Any, Path], None]  # options, and the file that rank 0 writes


def preload(module: str) -> None:
    """Lets a server import the module, and torch, once for all processes that are started."""
    torch.multiprocessing.set_forkserver_preload([module])


def run_ranks(main: RankMain, options: Any, k: int) -> dict[str, Any]:
    """Runs `main` in k processes; returns the JSON that rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        shared = (k, free_port(), main, options, result)
        start_processes(run_rank, shared, nprocs=k, start_method="forkserver")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def run_rank(rank: int, k: int, port: int, main: RankMain, options: Any, result: Path) -> None:
    os.environ.update(rank_environment(rank, k, "127.0.0.1", port, local=k))
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    main(options, result)


def measure_on_rank(measure: Callable[[], dict[str, Any]], result: Path) -> None:
    """Measures in a process group; rank 0 writes what was measured to `result` as JSON."""
    torch.set_num_threads(1)
    # GAF warns that tau accepts everything, which is meant here.
    warnings.filterwarnings("ignore", message="gaf:")
    dist.init_process_group("gloo")
    try:
        found = measure()
        if dist.get_rank() == 0:
            result.write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rank_environment(rank: int, k: int, address: str, port: int, local: int) -> dict[str, str]:
    """torchrun's variables, by which a process finds its rank. `local` ranks share its machine."""
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
