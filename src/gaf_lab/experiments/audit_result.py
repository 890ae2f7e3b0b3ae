"""What an audit has found, and its line.

audit.jsonl has a line per seed:

    {"kind": "audit", "seed", "task", "dataset", "noise", "noise_rate", "policy", "k", "b",
     "passes", "samples", "flipped", "auroc": {score: ...}, "first100": {score: ...},
     "issues": {"count", "precision", "recall"}, "selected"}

samples: those that were judged; first100: the share of flipped samples among the 100 most suspect;
precision of issues: among those that are marked. All but count are null if no label is known to be
wrong.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gaf_lab.data.run_data import RunData

AuditLine = dict[str, Any]
FIRST = 100


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The report of a run, and what is known of the truth.

    Attributes:
        problem: whose training samples they are.
        report: of `gaf.SampleAgreement`; its `index` counts the samples of `problem.train`.
        separation: of `gaf.SampleAgreement`; None for a judge without prototypes.
        selected: the best held-out accuracy at an evaluation.
    """

    problem: RunData
    report: dict[str, list[Any]]
    separation: float | None
    selected: float

    @cached_property
    def index(self) -> Tensor:
        """(n,), places of the samples in `problem.train`."""
        return torch.tensor(self.report["index"])

    @cached_property
    def origin(self) -> list[int]:
        """Their places in the data set."""
        found: list[int] = self.problem.origin[self.index].tolist()
        return found

    @cached_property
    def samples(self) -> list[str]:
        """Their names, such as files; empty if the task names none."""
        names = self.problem.problem.sample_names
        return [names[i] for i in self.origin] if names else []

    def name_class(self, label: int) -> str:
        """The name of a class; its number if the task names none."""
        names = self.problem.problem.class_names
        return names[label] if names else str(label)

    @cached_property
    def truth(self) -> list[int]:
        """Their true labels, of targets that are classes."""
        found: list[int] = self.problem.train.truth.cpu()[self.index].tolist()
        return found

    @cached_property
    def flipped(self) -> Tensor:
        """(n,) bool: whether the target is known to be wrong."""
        train = self.problem.train
        if train.observed is None or train.clean is None:
            return torch.zeros(len(self.index), dtype=torch.bool)
        wrong = (train.observed != train.clean).reshape(len(train), -1).any(1)
        return wrong.cpu()[self.index]

    @cached_property
    def quality(self) -> Tensor:
        """(n,) in [0, 1]; lower is more suspect."""
        return torch.tensor(self.report["label_quality"])

    @cached_property
    def order(self) -> list[int]:
        """The rows of the report, the most suspect first."""
        found: list[int] = self.quality.argsort(stable=True).tolist()
        return found

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """By name, higher for what is more suspect; `quality` is what the samples are ranked by."""
        names = [name for name in ("loss", "disagreement") if name in self.report]
        return {"quality": 1 - self.quality, **{n: torch.tensor(self.report[n]) for n in names}}

    def line(self) -> AuditLine:
        config = self.problem.config
        fields = ("seed", "task", "dataset", "noise", "noise_rate", "policy", "k", "b", "passes")
        return {
            "kind": "audit",
            **{name: getattr(config, name) for name in fields},
            "samples": len(self.index),
            "flipped": int(self.flipped.sum()),
            **self._found(),
            "separation": self.separation,
            "selected": self.selected,
        }

    def _found(self) -> dict[str, Any]:
        """How well the flipped samples were found."""
        flipped, marked = self.flipped, torch.tensor(self.report["is_label_issue"])
        auroc: dict[str, float | None] = dict.fromkeys(self.scores)
        first: dict[str, float | None] = dict.fromkeys(self.scores)
        issues: dict[str, Any] = {"count": int(marked.sum()), "precision": None, "recall": None}
        if flipped.any() and not flipped.all():
            for name, score in self.scores.items():
                auroc[name] = float(roc_auc_score(flipped, score))
                order = score.argsort(descending=True, stable=True)
                first[name] = float(flipped[order[:FIRST]].double().mean())
            right = float(flipped[marked].sum())
            issues["recall"] = right / float(flipped.sum())
            issues["precision"] = right / issues["count"] if issues["count"] else None
        return {"auroc": auroc, "first100": first, "issues": issues}
