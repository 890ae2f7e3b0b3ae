"""What an audit has found, and its line.

samples.csv has a line per training sample; audit.jsonl a line per seed:

    {"kind": "audit", "seed", "b", "k", "samples", "flipped",
     "auroc": {score: ...}, "precision": {score: ...},
     "issues": {"count", "precision", "recall"}, "selected", "steps_taken"}

precision: the share of flipped samples among the most suspect, as many as are flipped; of issues,
among those that are marked. All but count are null if no label is known to be wrong.
"""

from dataclasses import dataclass
from typing import Any

from sklearn.metrics import roc_auc_score
from torch import Tensor

from gaf_lab.data.problem import Problem

AuditLine = dict[str, Any]


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What a run has measured of its training samples, (n,) tensors, and of itself.

    Attributes:
        problem: whose samples they are.
        scores: by name, higher for what is more suspect.
        quality: of the given label, in [0, 1]; lower is more suspect.
        predicted: the most probable class, on average over the evaluations.
        issues: bool; which labels are taken to be wrong.
        appearances: compared micro-batches that contained the sample.
        selected: the best held-out accuracy at an evaluation.
        taken: share of steps that were taken.
    """

    problem: Problem
    scores: dict[str, Tensor]
    quality: Tensor
    predicted: Tensor
    issues: Tensor
    appearances: Tensor
    selected: float
    taken: float

    @property
    def flipped(self) -> Tensor:
        return (self.problem.train.observed != self.problem.train.clean).cpu()

    @property
    def order(self) -> list[int]:
        """The samples, the most suspect first."""
        found: list[int] = self.quality.argsort(stable=True).tolist()
        return found

    def line(self) -> dict[str, Any]:
        config, flipped = self.problem.config, self.flipped
        flips = int(flipped.sum())
        return {
            "kind": "audit",
            "seed": config.seed,
            "dataset": config.dataset,
            "noise": config.noise,
            "noise_rate": config.noise_rate,
            "b": config.b,
            "k": config.k,
            "samples": len(flipped),
            "flipped": flips,
            **self._found(flipped, flips if flips < len(flipped) else 0),
            "selected": self.selected,
            "steps_taken": self.taken,
        }

    def _found(self, flipped: Tensor, flips: int) -> dict[str, Any]:
        """How well the flipped samples were found. flips: how many; 0 if that is not known."""
        auroc: dict[str, float | None] = dict.fromkeys(self.scores)
        precision: dict[str, float | None] = dict.fromkeys(self.scores)
        marked = int(self.issues.sum())
        issues: dict[str, Any] = {"count": marked, "precision": None, "recall": None}
        if flips:
            for name, score in self.scores.items():
                first = score.argsort(descending=True)[:flips]
                auroc[name] = float(roc_auc_score(flipped, score))
                precision[name] = float(flipped[first].double().mean())
            right = float(flipped[self.issues].sum())
            issues["recall"] = right / flips
            issues["precision"] = right / marked if marked else None
        return {"auroc": auroc, "precision": precision, "issues": issues}
