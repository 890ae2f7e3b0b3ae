"""Rules against each other on digits: clean labels, wrong labels on all rows, one bad worker.

    python benchmarks/rules.py --out benchmarks/rules.jsonl

Each step averages, or does not, k = 8 micro-gradients of 20 pictures; row i is worker i, which
keeps its own eighth of the data. Without torchjd its rules are left out.
"""

import argparse
import json
import random
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf

K, B, STEPS, TRAIN = 8, 20, 150, 1200
SETTINGS = ("clean", "40% wrong labels on every worker", "one worker of eight with wrong labels")
BAD = 3  # the worker whose labels are wrong
SIGNS, MASK = "SignAgreement(6)", "RandomMask, as many coordinates"
RULES: dict[str, Callable[[float], Any]] = {  # from the share of coordinates that SIGNS moved
    "Mean()": lambda share: gaf.Mean(),
    "Guard()": lambda share: gaf.Guard(),
    "GAF(0.9)": lambda share: gaf.GAF(0.9),
    'GAF(0.9, start="best")': lambda share: gaf.GAF(0.9, start="best"),
    'GAF("auto")': lambda share: gaf.GAF("auto"),
    "Median()": lambda share: gaf.Median(),
    "TrimmedMean(1)": lambda share: gaf.TrimmedMean(1),
    SIGNS: lambda share: gaf.SignAgreement(6),
    MASK: lambda share: gaf.RandomMask(share),
}
TORCHJD = {"UPGrad": (), "MGDA": (), "Krum": (1,)}


def all_rules() -> dict[str, Callable[[float], Any]]:
    found = dict(RULES)
    if find_spec("torchjd") and find_spec("quadprog"):
        made = import_module("torchjd.aggregation")
        for name, given in TORCHJD.items():
            kind = getattr(made, f"{name}Weighting")
            found[f"TorchJD {name}"] = lambda share, kind=kind, given=given: kind(*given)
    return found


def digits(setting: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(8, 150, 64) pictures by worker, their labels, and 597 pictures with labels to test on."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rng = (x / 16).float(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=rng)
    train, test = order[:TRAIN], order[TRAIN:]
    labels = y[train].view(K, -1)
    others = (labels + torch.randint(1, 10, labels.shape, generator=rng)) % 10
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    if setting == SETTINGS[1]:
        wrong = torch.rand(labels.shape, generator=rng) < 0.4
    if setting == SETTINGS[2]:
        wrong[BAD] = True
        others = 9 - labels  # the same wrong label for all pictures of a digit
    return x[train].view(K, -1, 64), torch.where(wrong, others, labels), x[test], y[test]


def train(policy: Any, setting: str, seed: int) -> dict[str, float]:
    """The accuracy at the end, the share of steps taken, and that of coordinates that moved."""
    x, y, test_x, test_y = digits(setting, seed)
    torch.manual_seed(seed)
    random.seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    acc = gaf.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), policy)
    rng, moved = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        for worker in range(K):
            chosen = torch.randint(x.shape[1], (B,), generator=rng)
            acc.backward(cross_entropy(model(x[worker, chosen]), y[worker, chosen]))
        if acc.decide().stepped:
            # of the last layer: a hidden unit that is off has no gradient in the first
            moved.append((model[2].weight.grad != 0).double().mean().item())
        acc.step()
    right = (model(test_x).argmax(1) == test_y).double().mean().item()
    share = sum(moved) / max(len(moved), 1)
    return {"accuracy": right, "stepped": acc.stats()["stepped"] / STEPS, "moved": share}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with options.out.open("w") as file:
        given = {"kind": "conditions", "k": K, "b": B, "steps": STEPS, "torch": torch.__version__}
        file.write(json.dumps(given) + "\n")
        for setting in SETTINGS:
            for seed in range(options.seeds):
                share = 0.5
                for name, make in all_rules().items():
                    found = train(make(share), setting, seed)
                    share = found["moved"] if name == SIGNS else share
                    line = {"kind": "rule", "rule": name, "setting": setting, "seed": seed}
                    file.write(json.dumps(line | found) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
