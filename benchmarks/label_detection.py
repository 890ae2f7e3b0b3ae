"""How well wrong labels are found while an MLP trains, by what is seen of each sample.

    python benchmarks/label_detection.py --out results/label-detection.jsonl

A multilayer perceptron (784-512-512-10, SGD 0.05 with momentum 0.9, n = 160, no augmentation) is
trained by plain averaging on labels of which a share is flipped to any other class (symmetric) or
to the next one (asymmetric). The scores of each sample, from the visits of the training alone:

    loss        minus the loss
    teacher     the label's probability under the average of the weights (0.99 a step)
    prototype   the margin of `gaf.SampleAgreement`
    plain       the same without its refinement (refine=False)
    vote        its class vote, in the last layer

each at the last visit and as the mean over all visits (`history`), and the share of visits at which
the network's answer (`disagreement`) or the nearest prototype (`prototype_disagreement`) was not
the label. Beside it, the usual way with several trainings: five folds, each judged by a network
that was trained on the other four (`folds`: the label's probability).

The file has a line for each data set, noise, rate, seed and number of passes: the area under the
ROC curve, the average precision, and the precision among the first 100 of each score; how many
issues `report()` has, and how many of these are wrong; and the CPU seconds of a plain training, of
one that also scores, and of the folds. A run that is interrupted goes on with the same command.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gaf
from gaf.samples.history import DISAGREED, LOSS, SCORE
from gaf_lab.data import noise
from gaf_lab.data.augment import normalise
from gaf_lab.data.make_data import subset
from gaf_lab.data.sampling import generator
from gaf_lab.data.sets import load_once
from gaf_lab.records.measurements import write_measurements
from gaf_lab.training.models import mlp
from gaf_lab.training.techniques import ema_model

N, FOLDS, LIMIT = 160, 5, 5000
GRID = [("symmetric", 0.4), ("asymmetric", 0.4), ("asymmetric", 0.2), ("symmetric", 0.2)]
GRID += [("symmetric", 0.1), ("symmetric", 0.6)]
WITH_FOLDS = GRID[:3]


class Line(dict[str, Any]):
    def line(self) -> dict[str, Any]:
        return {"kind": "label-detection", **self}


def quality(suspicion: Tensor, wrong: Tensor) -> dict[str, float]:
    """AUROC (ties count half), average precision, and precision among the first 100."""
    suspicion = suspicion.double()
    values, place = suspicion.unique(return_inverse=True)
    counts = torch.bincount(place, minlength=len(values)).double()
    middle = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of equals, counted from 1
    n, m = int(wrong.sum()), int((~wrong).sum())
    area = (middle[place][wrong].sum() - n * (n + 1) / 2) / (n * m)
    hits = wrong[suspicion.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    found = {"auroc": area, "ap": (precision * hits).sum() / n, "first100": precision[99]}
    return {name: round(float(value), 5) for name, value in found.items()}


def network(x: Tensor, classes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp(x[0].numel(), classes)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Watch:
    """Sums of each score over the visits of each sample, during a plain training."""

    def __init__(self, model: nn.Module, n: int) -> None:
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        each: dict[str, Any] = {"num_samples": n, "weigh": False}
        losses = nn.CrossEntropyLoss(reduction="none")
        self.prototype = gaf.SampleAgreement(losses, head, "prototype", **each)
        self.plain = gaf.SampleAgreement(losses, head, "prototype", refine=False, **each)
        self.vote = gaf.SampleAgreement(losses, head, "vote", **each)
        self.teacher, self.probability = ema_model(model, 0.99), torch.zeros(n)

    @torch.no_grad()
    def look(self, x: Tensor, y: Tensor, i: Tensor) -> None:
        """Before a step: the teacher's answer."""
        p = self.teacher(x).softmax(1)
        self.probability[i] += p.gather(1, y[:, None])[:, 0]

    def sums(self) -> dict[str, Tensor]:
        """Higher for a trusted label."""
        prototype, vote = self.prototype.history.table, self.vote.history.table
        return {
            "loss": -prototype[:, LOSS],
            "teacher": self.probability.clone(),
            "prototype": prototype[:, SCORE].clone(),
            "plain": self.plain.history.table[:, SCORE].clone(),
            "vote": vote[:, SCORE].clone(),
            "disagreement": -vote[:, DISAGREED],
            "prototype_disagreement": -prototype[:, DISAGREED],
        }


def watched(
    data: Any, x: Tensor, test: Tensor, given: Tensor, seed: int, at: list[int]
) -> list[Line]:
    """A line for each number of passes in `at`, of one training."""
    torch.manual_seed(seed)
    model, optimizer = network(x, data.classes)
    watch, draw, lines = Watch(model, len(x)), generator(seed, "batches"), []
    wrong, spent = given != data.train_y, 0.0
    for number in range(1, max(at) + 1):
        before, started = watch.sums(), time.process_time()
        for i in torch.randperm(len(x), generator=draw).split(N):
            outputs = model(x[i])
            watch.look(x[i], given[i], i)
            watch.vote(outputs, given[i], index=i)
            watch.plain(outputs, given[i], index=i)
            step(optimizer, watch.prototype(outputs, given[i], index=i))
            watch.teacher.update_parameters(model)
        spent += time.process_time() - started
        if number in at:
            after = watch.sums()
            found = {f"history_{name}": -value for name, value in after.items()}
            for name in ("loss", "teacher", "prototype", "plain", "vote"):
                found[name] = before[name] - after[name]
            report = watch.prototype.report()  # without those that could not be judged
            issue = torch.zeros_like(wrong)
            issue[report["index"]] = torch.tensor(report["is_label_issue"])
            lines.append(
                Line(
                    passes=number,
                    accuracy=round(accuracy(model, test, data.test_y), 4),
                    issues=int(issue.sum()),
                    issues_wrong=int((issue & wrong).sum()),
                    wrong=int(wrong.sum()),
                    cpu_seconds=round(spent, 2),
                    scores={name: quality(v.nan_to_num(0), wrong) for name, v in found.items()},
                )
            )
    return lines


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def folds(data: Any, x: Tensor, given: Tensor, seed: int, at: list[int]) -> list[Line]:
    """The same by five folds: a line for each length of their trainings."""
    order = torch.randperm(len(x), generator=generator(seed, "folds"))
    trust, spent = {number: torch.zeros(len(x)) for number in at}, dict.fromkeys(at, 0.0)
    for fold, out in enumerate(order.chunk(FOLDS)):
        torch.manual_seed(seed * FOLDS + fold)
        model, optimizer = network(x, data.classes)
        within = torch.ones(len(x), dtype=torch.bool)
        within[out] = False
        rest, draw = within.nonzero()[:, 0], generator(seed, "batches", fold)
        started = time.process_time()
        for number in range(1, max(at) + 1):
            for i in rest[torch.randperm(len(rest), generator=draw)].split(N):
                step(optimizer, nn.functional.cross_entropy(model(x[i]), given[i]))
            if number in at:
                with torch.no_grad():
                    p = model(x[out]).softmax(1)
                trust[number][out] = p.gather(1, given[out, None])[:, 0]
                spent[number] += time.process_time() - started
    wrong = given != data.train_y
    return [
        Line(
            passes=number,
            cpu_seconds=round(spent[number], 2),
            scores={"folds": quality(-trust[number], wrong)},
        )
        for number in at
    ]


def plain_seconds(data: Any, x: Tensor, given: Tensor, passes: int) -> float:
    """CPU seconds of a training that scores nothing."""
    model, optimizer = network(x, data.classes)
    started = time.process_time()
    for _ in range(passes):
        for i in torch.randperm(len(x)).split(N):
            step(optimizer, nn.functional.cross_entropy(model(x[i]), given[i]))
    return round(time.process_time() - started, 2)


def flip(data: Any, kind: str, rate: float, seed: int) -> Tensor:
    make = noise.symmetric if kind == "symmetric" else noise.asymmetric
    return make(data.train_y, rate, data.classes, seed)[0]


def limited(name: str) -> Any:
    """The data set with at most `LIMIT` pictures to train on, and to test."""
    data = load_once(name, None)
    kept, tested = (subset(name, len(y), LIMIT) for y in (data.train_y, data.test_y))
    train = {"train_x": data.train_x[kept], "train_y": data.train_y[kept]}
    tests = {"test_x": data.test_x[tested], "test_y": data.test_y[tested]}
    return dataclasses.replace(data, human=None, **train, **tests)


def run(name: str, kind: str, rate: float, seed: int, at: list[int]) -> list[Line]:
    data = limited(name)
    x, test = (normalise(part, data.mean, data.std) for part in (data.train_x, data.test_x))
    given = flip(data, kind, rate, seed)
    plain = plain_seconds(data, x, given, at[-1])
    lines = [Line(way="watched", **line) for line in watched(data, x, test, given, seed, at)]
    if (kind, rate) in WITH_FOLDS:
        more = folds(data, x, given, seed, at[1:-1])
        lines += [Line(way="folds", **line) for line in more]
    where = {"dataset": name, "noise": kind, "rate": rate, "seed": seed}
    return [Line(where, plain_cpu_seconds=plain, **line) for line in lines]


def recorded(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [Line({k: v for k, v in line.items() if k != "kind"}) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--datasets", nargs="+", default=["fashion-mnist", "mnist5k"])
    parser.add_argument("--settings", type=int, default=len(GRID), help="only the first ones")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 3, 6, 12, 24])
    parser.add_argument("--out", type=Path, default=Path("results/label-detection.jsonl"))
    options = parser.parse_args()
    lines = recorded(options.out)
    done = {(line["dataset"], line["noise"], line["rate"], line["seed"]) for line in lines}
    conditions = {"model": "mlp", "n": N, "limit": LIMIT, "folds": FOLDS, "seeds": options.seeds}
    for kind, rate in GRID[: options.settings]:
        for name in options.datasets:
            for seed in range(options.seeds):
                if (name, kind, rate, seed) in done:
                    continue
                lines += run(name, kind, rate, seed, options.passes)
                write_measurements(lines, options.out, conditions)
                print(name, kind, rate, seed, flush=True)


if __name__ == "__main__":
    main()
