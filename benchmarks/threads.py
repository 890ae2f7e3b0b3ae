"""CPU time of a command alone and on a busy machine, by how its threads wait for one another.

    .venv/bin/python benchmarks/threads.py --rounds 3 --out benchmarks/threads.jsonl

Runs `gaf train` as a user would, on all cores: with one thread, with threads that sleep while they
wait (the setting of `gaf`), and with threads that spin (the default of GNU's OpenMP). Each runs
first beside whatever else the machine does, then beside --others processes that each need a core.
A round is every setting in turn. CPU time is that of the whole command, start and child processes
included.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gaf_lab.records import environment

NOISE = [
    "--dataset",
    "noise",
    "--limit",
    "5000",
    "--k",
    "2",
    "--b",
    "100",
    "--probe",
    "100",
    "--passes",
    "100",
    "--eval-every",
    "100",
]
COMMANDS = {
    "mlp": [
        "--preset",
        "demo-gaf",
        "--tau",
        "2",
        "--passes",
        "20",
        "--eval-every",
        "20",
        "--steps",
        "80",
    ],
    "convnet": [*NOISE, "--model", "convnet", "--tau", "2", "--steps", "5"],
}
ONE = "one thread"
SETTINGS: dict[str, dict[str, str]] = {
    ONE: {"OMP_NUM_THREADS": "1"},
    "sleeping": {},  # what the command sets
    "spinning briefly": {"GOMP_SPINCOUNT": "1000"},
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # what GNU's OpenMP does where nothing is set
}


def main() -> int:
    options = arguments()
    conditions = {
        "kind": "conditions",
        "rounds": options.rounds,
        "versions": environment.versions(),
        "machine": environment.machine(torch.device("cpu")),
        "commit": environment.commit(),
    }
    lines = []
    with options.out.open("w") as file:
        print(json.dumps(conditions), file=file, flush=True)
        for line in measure(options.rounds, options.others, options.models):
            print(json.dumps(line), file=file, flush=True)
            lines.append(line)
    for row in table(lines):
        print(row)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--others", type=int, default=os.cpu_count() or 1, help="busy processes")
    parser.add_argument("--models", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def measure(rounds: int, others: int, models: list[str]) -> Iterator[dict[str, Any]]:
    for number, beside, model in itertools.product(range(rounds), (0, others), models):
        with busy(beside):
            for setting, environ in SETTINGS.items():
                seconds, cpu = taken(COMMANDS[model], environ)
                yield {
                    "kind": "threads",
                    "round": number,
                    "model": model,
                    "setting": setting,
                    "others": beside,
                    "seconds": round(seconds, 2),
                    "cpu_seconds": round(cpu, 2),
                    "load": round(os.getloadavg()[0], 1),
                }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Meanwhile, so many processes want a core each."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def taken(words: list[str], environ: dict[str, str]) -> tuple[float, float]:
    """Seconds on the clock, and of the CPU, of a whole command."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gaf_lab", "train", *words, "--out", f"{folder}/run"]
        started = time.perf_counter()
        process = subprocess.Popen(command, env=clean | environ, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise SystemExit(
            f"threads: the command must succeed; {' '.join(command)} ended with {status}."
        )
    return seconds, used.ru_utime + used.ru_stime


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A row of Markdown for each model and setting.

    CPU time is relative to one thread without others, in the same round.
    """
    columns = ("CPU time, no others", "CPU time, others", "time, no others", "time, others")
    yield f"| model | threads | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|"
    for model, setting in itertools.product(
        dict.fromkeys(line["model"] for line in lines), SETTINGS
    ):
        cells = [
            spread(
                compared(lines, model, setting, what, others),
                stopped(lines, model, setting, others),
            )
            for what, others in itertools.product(("cpu_seconds", "seconds"), (False, True))
        ]
        yield f"| {model} | {setting} | {' | '.join(cells)} |"


def spread(ratios: list[float], stopped: bool) -> str:
    if not ratios:
        return "not run"
    more = "more than " if stopped else ""
    if len(ratios) == 1:
        return f"{more}{ratios[0]:.2f}"
    return f"{more}{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def stopped(lines: list[dict[str, Any]], model: str, setting: str, others: bool) -> bool:
    """Whether one of these commands was ended before it was through."""
    return any(
        line.get("stopped", False)
        for line in lines
        if (line["model"], line["setting"], bool(line["others"])) == (model, setting, others)
    )


def compared(
    lines: list[dict[str, Any]], model: str, setting: str, what: str, others: bool
) -> list[float]:
    """By rounds, a setting over one thread without others."""
    found = {
        (line["round"], line["setting"], bool(line["others"])): line[what]
        for line in lines
        if line["model"] == model
    }
    rounds = sorted(n for n, *case in found if case == [setting, others])
    return [found[n, setting, others] / found[n, ONE, False] for n in rounds]


if __name__ == "__main__":
    raise SystemExit(main())
