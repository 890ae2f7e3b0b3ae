"""How well wrong labels are found while an MLP trains, by what is seen of each sample.

    python benchmarks/label_detection.py --out results/label-detection.jsonl

A multilayer perceptron (784-512-512-10, SGD 0.05 with momentum 0.9, n = 160, no augmentation) is
trained by plain averaging on labels of which a share is flipped to any other class (symmetric) or
to the next one (asymmetric). On CIFAR-100N the labels are those given by people (human), all 50,000
pictures, shifted and mirrored at random, and the network is ResNet18 with the ImageNet stem, in
bfloat16:

    python benchmarks/label_detection.py --datasets cifar100n cifar100n-coarse --seeds 3 \
        --passes 1 3 6 12 --data FOLDER

The scores of each sample, from the visits of the training alone:

    loss        minus the loss
    margin      the output of the label less the largest other (Pleiss et al., arXiv 2001.10528,
                who take the mean over all visits)
    teacher     the label's probability under the average of the weights (0.99 a step)
    prototype   the margin of `gaf.SampleAgreement`
    plain       the same without its refinement (refine=False)
    inner       the same by inner products in place of scaled cosines
    vote        its class vote, in the last layer

each at the last visit and as the mean over all visits (`history`), and the share of visits at which
the network's answer (`disagreement`) or the nearest prototype (`prototype_disagreement`) was not
the label. Beside it, the usual way with several trainings: five folds, each judged by a network
that was trained on the other four (`folds`: the label's probability).

The file has a line for each data set, noise, rate, seed and number of passes: the area under the
ROC curve, the average precision, and the precision among the first 100 of each score; how many
issues `report()` has, and how many of these are wrong; and the CPU seconds of a plain training, of
one that also scores, and of the folds. Human labels have neither folds nor a plain training. A run
that is interrupted goes on with the same command.
"""

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import gaf
from gaf.samples.history import DISAGREED, LOSS, SCORE
from gaf.samples.scores import prototype_margins
from gaf.samples.summing import finish_sum
from gaf_lab.data import noise
from gaf_lab.data.augment import crop_and_flip, normalise
from gaf_lab.data.make_data import subset
from gaf_lab.data.sampling import generator
from gaf_lab.data.sets import load_once
from gaf_lab.records.measurements import write_measurements
from gaf_lab.training.models import make_model, mlp
from gaf_lab.training.techniques import ema_model

N, FOLDS, LIMIT = 160, 5, 5000
GRID = [("symmetric", 0.4), ("asymmetric", 0.4), ("asymmetric", 0.2), ("symmetric", 0.2)]
GRID += [("symmetric", 0.1), ("symmetric", 0.6)]
HUMAN = {"cifar100n": 0.402, "cifar100n-coarse": 0.264}  # the share of wrong labels


class Line(dict[str, Any]):
    def line(self) -> dict[str, Any]:
        return self


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


def network(data: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    shape = data.train_x.shape[1:]
    if data.name in HUMAN:
        model = make_model("resnet18", shape, data.classes, "imagenet")
        model = model.to(memory_format=torch.channels_last)
    else:
        model = mlp(shape.numel(), data.classes)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def pictures(data: Any, i: Tensor, draw: torch.Generator) -> Tensor:
    """Those of a batch (n, C, H, W), augmented if the data set is large."""
    if data.name not in HUMAN:
        return normalise(data.train_x[i], data.mean, data.std)
    x = normalise(crop_and_flip(data.train_x[i], draw), data.mean, data.std)
    return x.contiguous(memory_format=torch.channels_last)


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
        self.teacher, self.probability = ema_model(model, 0.99).eval(), torch.zeros(n)
        self.inner, self.features = torch.zeros(n), torch.zeros(0)
        self.margin = torch.zeros(n)
        head.register_forward_pre_hook(self.catch)

    def catch(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.features = args[0].detach().float()

    @torch.no_grad()
    def look(self, x: Tensor, y: Tensor, i: Tensor, outputs: Tensor) -> None:
        """Before a step: margins, the teacher's answer, and plain prototypes' inner products."""
        self.margin[i] += prototype_margins(outputs, y)
        p = self.teacher(x).float().softmax(1)
        self.probability[i] += p.gather(1, y[:, None])[:, 0]
        finish_sum(self.plain)
        products = normalize(self.features, dim=1) @ self.plain.statistics.prototypes().T
        self.inner[i] += prototype_margins(products, y).nan_to_num()

    def sums(self) -> dict[str, Tensor]:
        """Higher for a trusted label."""
        prototype, vote = self.prototype.history.table, self.vote.history.table
        return {
            "loss": -prototype[:, LOSS],
            "margin": self.margin.clone(),
            "teacher": self.probability.clone(),
            "prototype": prototype[:, SCORE].clone(),
            "plain": self.plain.history.table[:, SCORE].clone(),
            "inner": self.inner.clone(),
            "vote": vote[:, SCORE].clone(),
            "disagreement": -vote[:, DISAGREED],
            "prototype_disagreement": -prototype[:, DISAGREED],
        }


def watched(data: Any, given: Tensor, seed: int, at: list[int]) -> list[Line]:
    """A line for each number of passes in `at`, of one training."""
    torch.manual_seed(seed)
    model, optimizer = network(data)
    watch, lines = Watch(model, len(given)), []
    draw, moved = generator(seed, "batches"), generator(seed, "augmentation")
    wrong, spent = given != data.train_y, 0.0
    for number in range(1, max(at) + 1):
        before, started = watch.sums(), time.process_time()
        for i in torch.randperm(len(given), generator=draw).split(N):
            x = pictures(data, i, moved)
            with torch.autocast("cpu", torch.bfloat16, data.name in HUMAN):
                outputs = model(x).float()
                watch.look(x, given[i], i, outputs)
            watch.vote(outputs, given[i], index=i)
            watch.plain(outputs, given[i], index=i)
            step(optimizer, watch.prototype(outputs, given[i], index=i))
            watch.teacher.update_parameters(model)
        spent += time.process_time() - started
        if number in at:
            after = watch.sums()
            found = {f"history_{name}": -value for name, value in after.items()}
            for name in ("loss", "margin", "teacher", "prototype", "plain", "inner", "vote"):
                found[name] = before[name] - after[name]
            report = watch.prototype.report()  # without those that could not be judged
            issue = torch.zeros_like(wrong)
            issue[report["index"]] = torch.tensor(report["is_label_issue"])
            lines.append(
                Line(
                    passes=number,
                    accuracy=round(accuracy(model, data), 4),
                    issues=int(issue.sum()),
                    issues_wrong=int((issue & wrong).sum()),
                    wrong=int(wrong.sum()),
                    cpu_seconds=round(spent, 2),
                    scores={name: quality(v.nan_to_num(0), wrong) for name, v in found.items()},
                )
            )
    return lines


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> float:
    """Of the test pictures, in evaluation mode."""
    model.eval()
    answers = [model(normalise(x, data.mean, data.std)).argmax(1) for x in data.test_x.split(LIMIT)]
    model.train()
    return float((torch.cat(answers) == data.test_y).double().mean())


def folds(data: Any, given: Tensor, seed: int, at: list[int]) -> list[Line]:
    """The same by five folds: a line for each length of their trainings."""
    x = normalise(data.train_x, data.mean, data.std)
    order = torch.randperm(len(x), generator=generator(seed, "folds"))
    trust, spent = {number: torch.zeros(len(x)) for number in at}, dict.fromkeys(at, 0.0)
    for fold, out in enumerate(order.chunk(FOLDS)):
        torch.manual_seed(seed * FOLDS + fold)
        model, optimizer = network(data)
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


def plain_seconds(data: Any, given: Tensor, passes: int) -> float:
    """CPU seconds of a training that scores nothing."""
    model, optimizer = network(data)
    started, draw = time.process_time(), torch.Generator()
    for _ in range(passes):
        for i in torch.randperm(len(given)).split(N):
            step(optimizer, nn.functional.cross_entropy(model(pictures(data, i, draw)), given[i]))
    return round(time.process_time() - started, 2)


def flip(data: Any, kind: str, rate: float, seed: int) -> Tensor:
    if kind == "human":
        return data.human
    make = noise.symmetric if kind == "symmetric" else noise.asymmetric
    return make(data.train_y, rate, data.classes, seed)[0]


def limited(name: str, folder: Path | None) -> Any:
    """The data set, with at most `LIMIT` pictures to train on and to test where an MLP does it."""
    data = load_once(name, folder)
    if name in HUMAN:
        return data
    kept, tested = (subset(name, len(y), LIMIT) for y in (data.train_y, data.test_y))
    train = {"train_x": data.train_x[kept], "train_y": data.train_y[kept]}
    tests = {"test_x": data.test_x[tested], "test_y": data.test_y[tested]}
    return dataclasses.replace(data, human=None, **train, **tests)


def run(data: Any, kind: str, rate: float, seed: int, way: str, at: list[int]) -> list[Line]:
    given = flip(data, kind, rate, seed)
    where: dict[str, Any] = {"kind": "label-detection", "dataset": data.name, "noise": kind}
    where |= {"rate": rate, "seed": seed}
    if kind != "human":
        where["plain_cpu_seconds"] = plain_seconds(data, given, at[-1])
    judge, passes = (watched, at) if way == "watched" else (folds, at[1:-1])
    return [Line(where | {"way": way} | line) for line in judge(data, given, seed, passes)]


def settings(options: argparse.Namespace) -> Iterator[tuple[str, str, float, int, str]]:
    """Data set, noise, its rate, seed and way of each training, in their order."""
    human = [(name, "human", HUMAN[name]) for name in options.datasets if name in HUMAN]
    flipped = [name for name in options.datasets if name not in HUMAN]
    grid = [(name, *setting) for setting in GRID[: options.settings] for name in flipped]
    return (
        (*place, seed, way)
        for place in grid + human
        for seed in range(options.seeds)
        for way in (("watched",) if place in human else ("watched", "folds"))
    )


def recorded(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    return [Line(json.loads(line)) for line in path.read_text().splitlines()[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--datasets", nargs="+", default=["fashion-mnist", "mnist5k"])
    parser.add_argument("--settings", type=int, default=len(GRID), help="only the first ones")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 3, 6, 12, 24])
    parser.add_argument("--data", type=Path, help="folder of the files of a data set")
    parser.add_argument("--out", type=Path, default=Path("results/label-detection.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "gaf: .* labels look wrong")  # so they do after one pass
    lines = recorded(options.out)
    done = {
        tuple(line[key] for key in ("dataset", "noise", "rate", "seed", "way")) for line in lines
    }
    conditions = {
        "model": "mlp",
        "model_of_human": "resnet18, imagenet stem",
        "n": N,
        "limit": LIMIT,
        "folds": FOLDS,
        "seeds": options.seeds,
    }
    for name, *setting in settings(options):
        if (name, *setting) not in done:
            lines += run(limited(name, options.data), *setting, options.passes)
            write_measurements(lines, options.out, conditions)
            print(name, *setting, flush=True)


if __name__ == "__main__":
    main()
