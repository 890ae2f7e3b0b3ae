"""Steps of ViT-L/16 on 224 x 224 pictures from JPEG files: seconds and memory of `gaf train`.

    .venv/bin/python benchmarks/vit_l16.py --b 4 --out benchmarks/vit_l16.jsonl

Runs averaging and GAF. The pictures are generated, one of each of 1,000 classes; the network is the
real one, with 304,326,632 parameters. A run is three steps, an evaluation on k b pictures and a
checkpoint. `peak_gib` is the largest memory of its process, including what it shares with the
workers that read for it; `load` is the machine's before the run. Lines are appended to the file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gaf_lab.data.generated import make_pictures
from gaf_lab.data.read_ahead import reader_count
from gaf_lab.records import checkpoint, environment
from gaf_lab.records import run as records

STEPS, K = 3, 2
# policy, tau; at 2 GAF accepts every row, the most work and memory that it can have
ARMS = (("mean", 0.97), ("gaf", 0.97), ("gaf", 2.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--b", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        pictures = make_pictures(Path(name) / "pictures", classes=1000, per_class=1, size=224)
        for policy, tau in ARMS:
            line = conditions() | measured(
                policy, tau, options.b, pictures, Path(name) / f"{policy}-{tau}"
            )
            print(json.dumps(line))
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def measured(policy: str, tau: float, b: int, pictures: Path, out: Path) -> dict[str, Any]:
    """Of one run, in a process of its own."""
    config = {
        "dataset": "imagenet",
        "model": "vit-l16",
        "size": 224,
        "k": K,
        "b": b,
        "policy": policy,
        "tau": tau,
        "noise": "none",
        "heldout": 0.0,
        "limit": K * b,
        "passes": STEPS,
        "eval_every": STEPS,
        "probe": 1,
        "optimizer": "sgd",
        "lr": 0.01,
        "device": "cpu",
    }
    words = [
        word for key, value in config.items() for word in (f"--{key.replace('_', '-')}", str(value))
    ] + ["--augment"]
    command = [
        sys.executable,
        "-m",
        "gaf_lab",
        "train",
        *words,
        "--data",
        str(pictures),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"vit_l16: gaf train must end well; it ended with status {status}.")
    run = records.read(out)
    (line,) = run.evals
    found = {
        name: line[name]
        for name in ("step", "steps_taken", "acceptance", "distance_mean", "train_loss", "rows")
    }
    return {
        "kind": "vit-l16",
        "config": run.header["config"],
        **found,
        "seconds_per_step": K * b / line["samples_per_second"],
        "peak_gib": usage.ru_maxrss / 2**20,
        "checkpoint_gib": (out / checkpoint.CHECKPOINT_FILE).stat().st_size / 2**30,
        "workers": reader_count(),
    }


def conditions() -> dict[str, Any]:
    versions = environment.versions() | {
        name: metadata.version(name) for name in ("transformers", "pillow")
    }
    return {
        "versions": versions,
        "machine": environment.machine(torch.device("cpu")),
        "commit": environment.commit(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
