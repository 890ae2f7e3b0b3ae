"""Ranks that judge each other's labels: `gaf.SampleAgreement(leave_own_rank_out=True)`.

    python benchmarks/label_ranks.py

Eight ranks train the multilayer perceptron of benchmarks/label_training.py on the same data: the
same split, wrong labels, weights at the start, rate, 30 passes, and 20 samples of each rank a step.
Each rank has a fixed eighth of the training pictures.

    bad shard, random         all labels of one rank are wrong, each any other class
    bad shard, next class     the same, each the next class, so that they agree with each other
    symmetric 40%, class-dependent 40%      wrong labels on all ranks alike

Each is trained by averaging, and by prototype weights that are judged by the mean features of all
ranks or of the other ranks. The loss is one weighted mean over the samples of all ranks, as
`gaf.SampleAgreement` has it; "own means" are the control: a weighted mean over each rank's own
samples, and the mean of these. Two judges watch averaging's run as well, without weights.

One process does the work of the eight ranks (`Judges`): the samples of one after the other, and
then the sum of what they add to the statistics. tests/distributed/test_sample_agreement.py compares
it with processes. The file has a line for each data set, setting, seed and rule: evaluations of the
weights and of their average, and how well the wrong labels are found by the mean score over the
visits, as in benchmarks/label_detection.py. An interrupted run goes on with the same command.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from label_detection import Line, quality, recorded
from label_training import BASE, DATA
from torch import Tensor, nn

import gaf
from gaf.samples.class_statistics import ClassStatistics
from gaf.samples.summing import Summing
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.run_data import RunData
from gaf_lab.data.sampling import Sharded, derive_seed
from gaf_lab.records.measurements import write_measurements
from gaf_lab.training.evaluate import measure
from gaf_lab.training.techniques import ema_model

RANKS, CPU = 8, torch.device("cpu")
LOOKS = (1, 3, 6, 12, 30)  # passes after which the judges report
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
SETTINGS: dict[str, dict[str, Any]] = {
    "bad shard, next class": {"noise": "asymmetric", "noise_rate": 1 / RANKS, "sampler": "sharded"},
    "bad shard, random": {"noise": "symmetric", "noise_rate": 1 / RANKS, "sampler": "sharded"},
    "class-dependent 40%": {"noise": "asymmetric", "noise_rate": 0.4},
    "symmetric 40%": {"noise": "symmetric", "noise_rate": 0.4},
}
RULES = {  # who judges, and of what the weighted loss is a mean
    "averaging": None,
    "all ranks": ("all", "step"),
    "the others": ("others", "step"),
    "all ranks, own means": ("all", "rank"),
    "the others, own means": ("others", "rank"),
}


class AsRank(Summing):
    """What one rank of a job adds to the statistics, kept until the step ends.

    Args:
        group: of the ranks that this process stands for.
        rank: this one.
        apart: whether each rank is judged by the others.
    """

    def __init__(self, group: Any, rank: int, apart: bool) -> None:
        super().__init__(group, apart)
        self.rank = rank

    @property
    def left_out(self) -> int | None:
        return self.rank if self.apart else None

    def start(self, sums: Tensor, statistics: ClassStatistics) -> None:
        self.sums = sums


class Judges:
    """The `gaf.SampleAgreement` of each rank.

    Args:
        head: the model's last layer.
        n: samples of the training set.
        apart: whether each rank is judged by the others.
        ranks: how many.
    """

    def __init__(self, head: nn.Linear, n: int | None, apart: bool, ranks: int, **o: Any) -> None:
        given: dict[str, Any] = {"num_samples": n, **o}
        self.each = [gaf.SampleAgreement(CROSS_ENTROPY, head, **given) for _ in range(ranks)]
        shape = head.out_features, head.in_features, ranks, CPU
        for rank, judge in enumerate(self.each):
            judge._summing = AsRank(judge._summing.group, rank, apart)
            if apart:
                judge.statistics = ClassStatistics(*shape)

    def weights(self, rank: int, outputs: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Of the samples of a rank, right after the model's forward pass with them."""
        judge = self.each[rank]
        judge(outputs.detach(), y, index=index)
        assert judge.weights is not None
        return judge.weights

    def end_step(self) -> None:
        """All ranks receive the sum over the ranks."""
        sums = [judge._summing.sums for judge in self.each]
        total = torch.stack([one for one in sums if one is not None]).sum(0)
        for judge in self.each:
            judge._summing.sums = total

    def found(self, wrong: Tensor) -> dict[str, Any]:
        """How well the mean scores over the visits find the wrong labels."""
        score, issue = torch.zeros(len(wrong)), torch.zeros_like(wrong)
        for judge in self.each:
            report = judge.report()
            score[report["index"]] = torch.tensor(report["prototype"])
            issue[report["index"]] = torch.tensor(report["is_label_issue"])
        counts = {"issues": int(issue.sum()), "issues_wrong": int((issue & wrong).sum())}
        return {**quality(-score, wrong), **counts, "wrong": int(wrong.sum())}


def make_data(name: str, setting: str, seed: int, folder: Path | None) -> RunData:
    given = DATA[name] | SETTINGS[setting]
    config = dataclasses.replace(BASE, **given, k=RANKS, b=BASE.b // RANKS, seed=seed)
    data = make_run_data(config, folder, CPU)
    if config.sampler == "sharded":
        return data
    parts = Sharded(torch.zeros(len(data.train), dtype=torch.bool), RANKS, config.b, seed)
    return dataclasses.replace(data, sampler=parts)  # at random, as the training set's order is


class Job:
    """A training on eight ranks, in one process."""

    def __init__(self, data: RunData, rule: tuple[str, str] | None) -> None:
        torch.manual_seed(derive_seed(data.config.seed, "weights"))
        self.data, self.rule, self.model = data, rule, data.new_model()
        self.average = ema_model(self.model, data.config.ema)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        head = [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]
        self.judges = {
            who: Judges(head, len(data.train), who == "others", RANKS, weigh=rule is not None)
            for who in ("all", "others")
            if rule is None or who == rule[0]
        }

    def step(self, number: int) -> None:
        losses, weights = [], []
        for rank in range(RANKS):
            x, y = self.data.micro_batch(number, rank)
            outputs, index = self.model(x), self.data.index(number, rank)
            given = [one.weights(rank, outputs, y, index) for one in self.judges.values()]
            losses.append(CROSS_ENTROPY(outputs, y))
            weights.append(given[0])
        for judges in self.judges.values():
            judges.end_step()
        self.optimizer.zero_grad()
        self.mean(torch.stack(losses), torch.stack(weights)).backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)

    def mean(self, losses: Tensor, weights: Tensor) -> Tensor:
        """Of losses and weights (ranks, b): over each rank and then over ranks, or over all."""
        if self.rule is None or self.rule[1] == "rank":
            return ((weights * losses).sum(1) / weights.sum(1)).mean()
        return (weights * losses).sum() / weights.sum()

    def run(self) -> Line:
        data, evals, found = self.data, [], []
        wrong, a_pass = data.train.labels != data.train.truth, len(data.train) / BASE.b
        looks = {round(passes * a_pass): passes for passes in LOOKS}
        for number in range(1, data.steps + 1):
            self.step(number - 1)
            if number in looks:
                each = {who: judges.found(wrong) for who, judges in self.judges.items()}
                found.append({"passes": looks[number], **each})
            if data.evaluation(number) or number == data.steps:
                line = measure(self.average, self.model, data)
                kept = {name: value for name, value in line.items() if "accuracy" in name}
                evals.append({"passes": round(number / a_pass, 2), **kept})
        return Line(evals=evals, found=found)


def rules_for(setting: str) -> list[tuple[str, tuple[str, str] | None]]:
    """The control is run where a rank's labels are all wrong."""
    shard = setting.startswith("bad shard")
    return [(label, rule) for label, rule in RULES.items() if shard or "own means" not in label]


def settings(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Data set, setting and seed."""
    for name in options.datasets:
        for setting in SETTINGS:
            yield from ((name, setting, seed) for seed in range(options.seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATA))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder of the files of a data set")
    parser.add_argument("--out", type=Path, default=Path("results/label-ranks.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "gaf: .* labels look wrong")  # so they do after one pass
    lines = recorded(options.out)
    done = {(line["dataset"], line["setting"], line["seed"], line["rule"]) for line in lines}
    conditions = {"ranks": RANKS, "b": BASE.b // RANKS, "model": "mlp", "seeds": options.seeds}
    for name, setting, seed in settings(options):
        data = make_data(name, setting, seed, options.data)
        for label, rule in rules_for(setting):
            if (name, setting, seed, label) in done:
                continue
            where = {"kind": "label-ranks", "dataset": name, "setting": setting}
            where |= {"seed": seed, "rule": label}
            lines.append(Line(where | Job(data, rule).run()))
            write_measurements(lines, options.out, conditions)
            print(name, setting, seed, label, flush=True)


if __name__ == "__main__":
    main()
