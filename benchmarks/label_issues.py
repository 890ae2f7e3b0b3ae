"""Finds wrong labels while an MLP trains: how well `gaf.SampleAgreement` ranks and counts them.

    python benchmarks/label_issues.py --dataset mnist5k --out results/label-issues.jsonl

A multilayer perceptron (784-512-512-10, SGD 0.05 with momentum 0.9, b = 100, no augmentation) is
trained on labels of which 40% are symmetric flips, 40% flips to the next class, or none; on the
mean loss or, with `weigh`, on the weighted one. The file has a line for each noise, seed, way of
training and number of passes: the area under the ROC curve (AUROC) and the precision among the
first 100 of each score, how many issues the report counts and how many of these are wrong, and the
accuracy on clean test labels.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gaf
from gaf_lab.data import noise
from gaf_lab.data.augment import normalise
from gaf_lab.data.sampling import generator
from gaf_lab.data.sets import load_dataset
from gaf_lab.records.measurements import write_measurements
from gaf_lab.training.models import mlp

B, RATE = 100, 0.4
NOISES = ("symmetric", "asymmetric", "none")


class Line(dict[str, Any]):
    def line(self) -> dict[str, Any]:
        return {"kind": "label-issues", **self}


def observed(data: Any, kind: str, seed: int) -> Tensor:
    if kind == "symmetric":
        return noise.symmetric(data.train_y, RATE, data.classes, seed)[0]
    if kind == "asymmetric":
        return noise.asymmetric(data.train_y, RATE, data.classes, seed)[0]
    return data.train_y


def auroc(suspicion: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong label is more suspect than a right one."""
    order = suspicion.double().argsort()
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    n, m = int(wrong.sum()), int((~wrong).sum())
    return float((ranks[wrong].sum() - n * (n - 1) / 2) / (n * m))


def judged(report: dict[str, list[Any]], wrong: Tensor) -> dict[str, Any]:
    """What a report is worth, where the truth is known."""
    issue = torch.tensor(report["is_label_issue"])
    found: dict[str, Any] = {
        "issues": int(issue.sum()),
        "wrong": int(wrong.sum()),
        "issues_wrong": int((issue & wrong).sum()),
    }
    if not wrong.any():
        return found
    for name, sign in (("prototype", -1), ("loss", 1), ("disagreement", 1)):
        suspicion = sign * torch.tensor(report[name])
        first = suspicion.argsort(descending=True, stable=True)[:100]
        found[f"auroc_{name}"] = auroc(suspicion, wrong)
        found[f"precision100_{name}"] = float(wrong[first].double().mean())
    return found


def run(data: Any, kind: str, seed: int, weigh: bool, at: list[int]) -> list[Line]:
    torch.manual_seed(seed)
    given = observed(data, kind, seed)
    x, test = (normalise(part, data.mean, data.std) for part in (data.train_x, data.test_x))
    model = mlp(x[0].numel(), data.classes)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    loss_function = nn.CrossEntropyLoss(reduction="none")
    criterion = gaf.SampleAgreement(loss_function, head, weigh=weigh, num_samples=len(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    draw, lines = generator(seed, "batches"), []
    for number in range(1, max(at) + 1):
        for i in torch.randperm(len(x), generator=draw).split(B):
            loss = criterion(model(x[i]), given[i], index=i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if number in at:
            with torch.no_grad():
                accuracy = (model(test).argmax(1) == data.test_y).double().mean().item()
            report = criterion.report()
            wrong = (given != data.train_y)[torch.tensor(report["index"])]
            conditions = {"noise": kind, "seed": seed, "weigh": weigh, "passes": number}
            lines.append(Line(conditions, accuracy=accuracy, **judged(report, wrong)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, nargs="+", default=[3, 6, 12, 24])
    parser.add_argument("--out", type=Path, default=Path("results/label-issues.jsonl"))
    options = parser.parse_args()
    data = load_dataset(options.dataset, options.data)
    lines: list[Line] = []
    for kind in NOISES:
        for seed in range(options.seeds):
            for weigh in (False, True):
                lines += run(data, kind, seed, weigh, options.passes)
                print(lines[-1], flush=True)
    conditions = {
        "dataset": options.dataset,
        "model": "mlp",
        "b": B,
        "rate": RATE,
        "seeds": options.seeds,
    }
    write_measurements(lines, options.out, conditions)


if __name__ == "__main__":
    main()
