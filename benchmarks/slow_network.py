"""gaf bench ddp, or hsdp, on a slow network of Linux network namespaces.

    sudo .venv/bin/python benchmarks/slow_network.py --mbit 1000 --hosts 2 4 --rounds 20 --out FILE

Each "host" is a namespace with one process, and a bridge joins their limited links. A token bucket
(tc tbf) limits both directions of every link, so that a host sends and receives at most --mbit
megabits per second over all its connections. The lines are those of `gaf bench ddp --out` without
memory; `gaf bench ddp --against FILE` compares the cost model with them. With --engine hsdp each
host is a replica of one shard, and the lines are those of `gaf bench hsdp --no-memory --out`.

Exit codes: 0 measured, 1 a rank failed, 77 this machine does not allow it; one line gives the
reason. Namespaces and bridge are removed in every case.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, get_args

from gaf_lab.settings.fields import ModelName

NOT_HERE = 77
NETWORK = "10.213.77"
PORT = 29577
DEVICE = "eth0"  # in its own namespace
TIMEOUT = 3600  # seconds for all rounds of one number of hosts


class NotHere(Exception):
    """What this machine lacks."""


class Failed(Exception):
    """What went wrong in a rank."""


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    try:
        check_machine()
        found = [result for hosts in options.hosts for result in measure(hosts, options)]
    except NotHere as reason:
        print(f"slow_network: {reason}", file=sys.stderr)
        return NOT_HERE
    except Failed as reason:
        print(f"slow_network: {reason}", file=sys.stderr)
        return 1
    show(found, options)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hosts",
        type=int,
        nargs="+",
        default=[2, 4],
        help="numbers of hosts, each 2 to 200; default 2 4",
    )
    parser.add_argument(
        "--mbit",
        type=float,
        default=1000,
        help="megabits per second of each host's link; default 1000",
    )
    parser.add_argument("--engine", default="ddp", choices=("ddp", "hsdp"))
    parser.add_argument("--model", default="resnet18", choices=get_args(ModelName))
    parser.add_argument("--stem", default="imagenet", choices=("imagenet", "cifar"))
    parser.add_argument("--b", type=int, default=32, help="samples per process; default 32")
    parser.add_argument(
        "--rounds", type=int, default=10, help="steps of each kind, at least 2; default 10"
    )
    parser.add_argument("--out", type=Path, help="file for the figures, JSON lines")
    options = parser.parse_args()
    if (
        not all(2 <= hosts <= 200 for hosts in options.hosts)
        or options.rounds < 2
        or options.b < 2
        or options.mbit <= 0
    ):
        parser.error(
            "--hosts must lie in 2 to 200, --rounds and --b be at least 2, and --mbit be above 0."
        )
    return options


def check_machine() -> None:
    if sys.platform != "linux":
        raise NotHere(
            "the system must be Linux, for network namespaces; "
            f"it is {sys.platform}. Use gaf bench ddp."
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NotHere(
            f"the machine must have ip and tc; {' and '.join(missing)} not found. "
            "Install the package iproute2."
        )
    if os.geteuid() != 0:
        raise NotHere(
            "the user must be root, to make network namespaces; "
            f"it is number {os.geteuid()}. Use sudo."
        )


def measure(hosts: int, options: argparse.Namespace) -> list[object]:
    from gaf_lab.bench.launch import rank_environment

    wanted = {
        "model": options.model,
        "stem": options.stem,
        "b": options.b,
        "rounds": options.rounds,
    }
    if options.engine == "hsdp":
        wanted |= {"replicas": hosts, "shards": 1}
    module = f"gaf_lab.bench.{options.engine}_rank"
    with tempfile.TemporaryDirectory() as folder, network(hosts, options.mbit) as names:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, json.dumps(wanted), str(result)]
        ranks, said = [], [(Path(folder) / f"{name}.txt").open("wb+") for name in names]
        try:
            for rank, name in enumerate(names):
                place = rank_environment(rank, hosts, f"{NETWORK}.1", PORT, local=1) | {
                    "GLOO_SOCKET_IFNAME": DEVICE
                }
                ranks.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *command],
                        env=os.environ | place,
                        stderr=said[rank],
                    )
                )
            wait(ranks, said)
        finally:
            for process, file in zip(ranks, said, strict=False):
                process.kill()
                process.wait()
                file.close()
        return costs(hosts, wanted, json.loads(result.read_text()))


def costs(hosts: int, wanted: dict[str, Any], times: dict[str, Any]) -> list[object]:
    from gaf_lab.bench.ddp import ddp_costs
    from gaf_lab.bench.hsdp import hsdp_costs
    from gaf_lab.bench.hsdp_ways import HSDPSetup

    if "replicas" in wanted:
        return list(hsdp_costs(HSDPSetup(**wanted), times, {}))
    return list(ddp_costs(hosts, times, {}))


def wait(ranks: list[subprocess.Popen[bytes]], said: list[BinaryIO]) -> None:
    """Until all are done, or one has failed."""
    until = time.monotonic() + TIMEOUT
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            number = next(i for i, code in enumerate(codes) if code)
            said[number].seek(0)
            why = said[number].read().decode(errors="replace").strip()
            raise Failed(
                f"rank {number} must end with code 0; it ended with {codes[number]}:\n{why}"
            )
        if None not in codes:
            return
        if time.monotonic() > until:
            raise Failed(
                f"the ranks must be done within {TIMEOUT} s; they are not. Give fewer --rounds."
            )
        time.sleep(0.1)


# --- the network


@contextlib.contextmanager
def network(hosts: int, mbit: float) -> Iterator[list[str]]:
    """Namespaces with an interface each, limited to `mbit` in both directions.

    Their addresses begin at 10.213.77.1. They are removed at the end.
    """
    bridge, names = f"gafbr{os.getpid()}", [f"gaf{os.getpid()}-{i}" for i in range(hosts)]
    cables = [f"gv{os.getpid()}-{i}" for i in range(hosts)]
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
            join(bridge, name, cable, f"{NETWORK}.{i + 1}", mbit)
        yield names
    finally:
        for name, cable in zip(names, cables, strict=True):
            # goes with the namespace, but later
            subprocess.run(["ip", "link", "del", cable], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def join(bridge: str, name: str, cable: str, address: str, mbit: float) -> None:
    inside = ("ip", "netns", "exec", name)
    run("ip", "netns", "add", name)
    run("ip", "link", "add", cable, "type", "veth", "peer", "name", DEVICE, "netns", name)
    run("ip", "link", "set", cable, "master", bridge, "up")
    run(*inside, "ip", "address", "add", f"{address}/24", "dev", DEVICE)
    run(*inside, "ip", "link", "set", "lo", "up")
    run(*inside, "ip", "link", "set", "dev", DEVICE, "up")
    run(*inside, "tc", "qdisc", "add", "dev", DEVICE, *limit(mbit))  # what the host sends
    run("tc", "qdisc", "add", "dev", cable, *limit(mbit))  # what it receives


def limit(mbit: float) -> tuple[str, ...]:
    """A token bucket of 4 ms, at least a 64 KiB segment of TCP; a queue of 100 ms before it."""
    burst = max(2**17, int(mbit * 1e6 / 8 * 0.004))
    return (
        "root",
        "tbf",
        "rate",
        f"{round(mbit * 1e6)}bit",
        "burst",
        f"{burst}b",
        "latency",
        "100ms",
    )


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join((done.stderr or done.stdout).split()) or f"code {done.returncode}"
        raise NotHere(
            f"the kernel must allow `{' '.join(command)}`; it reports: {why.rstrip('.')}. "
            "Use one with CAP_NET_ADMIN, bridge, veth and tbf."
        )


def show(found: list[Any], options: argparse.Namespace) -> None:
    from rich.console import Console

    from gaf_lab.bench import ddp, hsdp
    from gaf_lab.bench.ddp_rank import DDPSetup
    from gaf_lab.records.measurements import write_measurements

    sharded = options.engine == "hsdp"
    Console().print(hsdp.hsdp_table(found) if sharded else ddp.table(found))
    if options.out is not None:
        wanted = DDPSetup(options.model, options.stem, options.b, options.rounds)
        given = hsdp.hsdp_conditions(found[-1].setup) if sharded else ddp.ddp_conditions(wanted)
        network = {"mbit": options.mbit, "network": "namespaces, tc tbf"}
        write_measurements(found, options.out, given | network)
        print(f"Figures: {options.out}")


if __name__ == "__main__":
    raise SystemExit(main())
