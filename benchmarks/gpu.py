"""On a CUDA GPU: is everything right, and what does it cost? In less than six minutes.

    python benchmarks/gpu.py --out benchmarks/gpu.jsonl      # from a checkout; needs only torch
    python benchmarks/gpu.py --out FILE --parts "one rank" "two ranks"
    python benchmarks/gpu.py --out FILE --device cpu         # a rehearsal: small sizes, no CUDA

Every part runs in its own process, which is stopped when its time is over, so that a hang or a
crash costs that part alone. Each line of the file is a check or a ratio, with the conditions.
A check has name, value, expected, tolerance and ok, which is null if it needs CUDA and there is
none. A ratio has the milliseconds of a step and the ratio to the plain way in the same round:
median, 10% and 90%. The exit status is 1 if a check failed. docs/engine.md explains the lines.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_parts.common import Line, Options, emit, failed, silence  # noqa: E402

# by name: the module and function that give the lines; the seconds after which the part is
# stopped; the seconds that each of its comparisons may take
PARTS: dict[str, tuple[str, str, float, float]] = {
    "accumulator": ("device", "accumulator", 35, 0),
    "scaler": ("device", "scaler", 20, 0),
    "measures": ("device", "measures", 20, 0),
    "samples": ("samples", "samples", 20, 0),
    "one rank": ("ranks", "one_rank", 25, 0),
    "two ranks": ("ranks", "two_ranks", 35, 0),
    "engine": ("engine", "engine", 55, 0),
    "ratios of accumulator": ("ratios", "ratios_of_accumulator", 45, 20),
    "ratios of engine": ("engine", "ratios_of_engine", 40, 15),
    "ratios of ranks": ("ranks", "ratios_of_ranks", 45, 8),
}  # 340 in all, and some seconds to start


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    device = device_of(options.device)
    if options.part is not None:
        run_part(options.part, device, options.rounds)
        return 0
    facts = conditions(device, options.commit)
    wrong = []
    with options.out.open("a") as file:
        for line in (
            line for part in options.parts for line in lines_of(part, device, options.rounds)
        ):
            file.write(json.dumps(line | facts) + "\n")
            file.flush()
            show(line)
            wrong += [line["name"]] if line.get("ok", True) is False else []
    print(f"{len(wrong)} failed: {'; '.join(wrong)}." if wrong else "Every check passed.")
    return 1 if wrong else 0


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="lines are added to it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=30, help="of each ratio, at most")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--commit", help="where it is no checkout")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # inside its process
    options = parser.parse_args(words)
    if options.out is None and options.part is None:
        parser.error("--out must name a file for the lines.")
    return options


def device_of(name: str) -> torch.device:
    cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def lines_of(part: str, device: torch.device, rounds: int) -> Iterator[Line]:
    """A part's lines, from a process of its own; one more that says how it ended."""
    began, late = time.perf_counter(), threading.Event()
    # A rehearsal may share its cores with much else.
    seconds = PARTS[part][2] * (40 if device.type == "cpu" else 1)
    command = [sys.executable, str(HERE / "gpu.py"), "--part", part, "--rounds", str(rounds)]
    command += ["--device", "cpu" if device.type == "cpu" else "auto"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        watch = threading.Timer(seconds, lambda: (late.set(), stop(process)))
        watch.start()
        try:
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith('{"kind":'):  # a library may print too
                    yield {"part": part, **json.loads(text)}
            status = process.wait()
        finally:
            watch.cancel()
            stop(process)
        errors.seek(0)
        tail = errors.read()[-2000:]
    if late.is_set():
        yield {"part": part, **failed(f"{part} ends", f"stopped after {seconds:.0f} s", tail)}
    elif status:
        yield {"part": part, **failed(f"{part} ends", f"exit status {status}", tail)}
    else:
        taken = round(time.perf_counter() - began, 1)
        yield {"kind": "part", "part": part, "name": f"{part} ended", "seconds": taken}


def stop(process: "subprocess.Popen[str]") -> None:
    """And the ranks that it started, which are in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_part(part: str, device: torch.device, rounds: int) -> None:
    """Inside the part's process: each line goes out as soon as it is there."""
    silence()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = not part.startswith("ratios")
    else:
        torch.set_num_threads(1)
    module, function, _, seconds = PARTS[part]
    options = Options(device, seconds, rounds, small=device.type == "cpu")
    for line in getattr(importlib.import_module(f"gpu_parts.{module}"), function)(options):
        emit(line)


def show(line: Line) -> None:
    if line["kind"] == "check":
        mark = {True: "ok    ", False: "FAILED", None: "-     "}[line["ok"]]
        print(f"{mark}  {line['name']:<75} {line['value']}", flush=True)
    elif line["kind"] == "ratio":
        spread = f"{line['ratio_p10']:.3f} to {line['ratio_p90']:.3f}"
        print(
            f"{line['name']:<60} {line['ms_median']:>9.2f} ms  {line['ratio_median']:.3f} "
            f"({spread}) of plain, n = {line['rounds']}",
            flush=True,
        )
    else:
        print(f"{line['name']} after {line['seconds']} s", flush=True)


def conditions(device: torch.device, commit: str | None) -> Line:
    """In every line: where, with what and when."""
    facts: Line = {
        "device": "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit
        or output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"),
        "cuda": None,
        "nccl": None,
        "driver": None,
    }
    if device.type == "cuda":
        nccl = torch.cuda.nccl.version() if dist.is_nccl_available() else ()
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, nccl)),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def output(*command: str) -> str | None:
    """What a program says; None where there is none, or it fails."""
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
