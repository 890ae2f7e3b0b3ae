"""gaf audit: trains a config, and ranks its training samples by how likely their labels are wrong.

samples.csv is ranked by label quality (`label_quality`), from the model's probabilities averaged
over the evaluations. is_label_issue marks its first m lines; m is the estimated number of wrong
labels.

For comparison, every sample has other scores, higher for what is more suspect: its loss, averaged
over the evaluations (as in O2U-Net, ICCV 2019), and at the evaluation that held-out labels choose;
and two of the filter's own. These are averages, over the compared micro-batches that contained the
sample, of

    distance of the micro-batch's gradient to the running sum - mean distance of the last 100 steps

in cosine distance; 0 is usual. `rejection` is the same with 1 for a distance above tau and 0 for
one below. Rejections are rare early on and frequent late; subtracting the recent mean removes this.
A step's own mean would leave nothing at k = 2, because one row is compared.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import gaf
from gaf.record.audit import value_per_row
from gaf.record.excess import Excess
from gaf.rules.sequential import TIE
from gaf_lab.experiments.audit_result import AuditResult
from gaf_lab.experiments.label_quality import count_wrong_labels, label_quality, mark_lowest
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.evaluate import logits
from gaf_lab.training.loop import Training


class Tally:
    """Scores n samples by the micro-batches that contained them; see gaf.Audit.

    By how far these were from the running sum, and by how often above tau.
    """

    def __init__(self, n: int) -> None:
        self.distances, self.rejections = gaf.Audit(n), Excess(n)

    def add(self, indices: Sequence[Tensor], outcome: gaf.Outcome) -> None:
        """Adds one step. indices: the samples of each of the k micro-batches, (b,)."""
        self.distances.record(indices, outcome)
        above = [float(d > outcome.tau + TIE) for d in outcome.distances]
        self.rejections.add(indices, value_per_row(above, outcome.distances))

    @property
    def appearances(self) -> Tensor:
        return self.distances.counts

    def distance_scores(self) -> Tensor:
        """(n,); 0 for a sample that no compared micro-batch contained."""
        return self.distances.scores().nan_to_num(0)

    def rejection_scores(self) -> Tensor:
        return self.rejections.scores().nan_to_num(0)


def audit_labels(
    config: TrainConfig, data_folder: Path | None, progress: Callable[[str, int, int], None]
) -> AuditResult:
    """Trains the config, and plain averaging on the same micro-batches.

    Args:
        config: of the filtered run; averaging's differs in its policy alone.
        data_folder: with the data set's archive; None downloads it.
        progress: is called with the name of the training, the step, and the number of steps.

    Raises:
        ConfigError, DataError: if an argument cannot be used.
        Diverged: if a training diverges.
    """
    check_audit(config)
    training = Training(dataclasses.replace(config, engine="plain"), data_folder)
    tally = Tally(len(training.problem.train))
    outputs, selected, taken = train_and_score(
        training, tally, lambda *at: progress("filtering", *at)
    )
    averaging = Training(dataclasses.replace(config, policy="mean", engine="plain"), data_folder)
    others, _, _ = train_and_score(averaging, None, lambda *at: progress("averaging", *at))
    best = max(range(len(selected)), key=lambda i: selected[i])
    given = training.problem.train.observed.cpu()
    p = outputs.probabilities / len(outputs.losses)
    quality = label_quality(p, given)
    scores = {
        "quality": 1 - quality,
        "loss": torch.stack(outputs.losses).mean(0),
        "loss_selected": outputs.losses[best],
        "loss_averaging": torch.stack(others.losses).mean(0),
        "distance": tally.distance_scores(),
        "rejection": tally.rejection_scores(),
    }
    return AuditResult(
        problem=training.problem,
        scores=scores,
        quality=quality,
        predicted=p.argmax(1),
        issues=mark_lowest(quality, count_wrong_labels(p, given)),
        appearances=tally.appearances,
        selected=selected[best],
        taken=taken,
    )


def check_audit(config: TrainConfig) -> None:
    if config.policy != "gaf" or config.scope != "all" or config.start != "first":
        raise ConfigError(
            "policy must be 'gaf' with scope 'all' and start 'first' for an audit, "
            "which scores distances to the running sum; "
            f"got {config.policy!r}, {config.scope!r} and {config.start!r}. "
            "Leave them at their defaults."
        )
    if config.k < 2:
        raise ConfigError(
            f"k must be at least 2 for an audit; got {config.k}. "
            "One micro-gradient has nothing to agree with."
        )
    if config.dataset == "imagenet":
        raise ConfigError("dataset must be in memory for an audit; got 'imagenet'. Use another.")


@dataclass(eq=False)
class Outputs:
    """A model's outputs for the training samples, in evaluation mode, at each evaluation so far.

    Attributes:
        losses: for each evaluation (n,), with the observed labels.
        probabilities: their sum, (n, classes).
    """

    losses: list[Tensor]
    probabilities: Tensor

    @torch.no_grad()
    def add(self, training: Training) -> None:
        train = training.problem.train
        found = logits(training.model, training.problem, train)
        loss = cross_entropy(found, train.observed, reduction="none")
        self.losses.append(loss.double().cpu())
        self.probabilities += found.softmax(1).double().cpu()


def train_and_score(
    training: Training, tally: Tally | None, progress: Callable[[int, int], None]
) -> tuple[Outputs, list[float], float]:
    """Trains to the end.

    Returns:
        The outputs and the held-out accuracies of the evaluations, and the share of steps taken.
    """
    problem, accuracies, taken = training.problem, [], 0
    probabilities = torch.zeros(len(problem.train), problem.classes, dtype=torch.float64)
    outputs = Outputs([], probabilities)
    while training.step < problem.steps:
        indices = [problem.index(training.step, i).cpu() for i in range(training.config.k)]
        outcome = training.macro_batch()
        taken += outcome.stepped
        if tally is not None:
            tally.add(indices, outcome)
        if problem.evaluation(training.step) or training.step == problem.steps:
            outputs.add(training)
            accuracies.append(float(training.evaluation()["heldout_accuracy"] or 0))
        progress(training.step, problem.steps)
    return outputs, accuracies, taken / problem.steps
