"""gaf audit: trains a config while `gaf.SampleAgreement` watches, and reports suspect labels.

It watches without effect: the run is that of `gaf train`.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import gaf
from gaf_lab.data.problem import Loss
from gaf_lab.data.trees import widen
from gaf_lab.experiments.audit_result import AuditResult
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.loop import Training
from gaf_lab.training.plain_engine import OneByOne


class WatchedObjective:
    """A run's objective that shows every micro-batch to a criterion, which judges its labels.

    Args:
        objective: of the run.
        criterion: is called with outputs, labels and places of the samples.
        loss: of the task, if its targets are no classes: the criterion gets the losses themselves.
    """

    def __init__(
        self, objective: Any, criterion: gaf.SampleAgreement, loss: Loss | None = None
    ) -> None:
        self.objective, self.criterion, self.loss = objective, criterion, loss

    def __call__(self, forward: Any, x: Any, y: Any, index: Tensor, *at: int) -> Tensor:
        """The objective's own loss of samples `index`: inputs x and targets y."""

        def seen(x: Any) -> Any:
            outputs = forward(x)
            shown = widen(outputs)
            shown = shown if self.loss is None else self.loss(shown, y)
            self.criterion(shown.detach(), y, index=index)
            return outputs

        loss: Tensor = self.objective(seen, x, y, index, *at)
        return loss


def audit_labels(
    config: TrainConfig, data_folder: Path | None, progress: Callable[[int, int], None]
) -> AuditResult:
    """Trains the config, and judges the labels that it is trained on.

    Args:
        config: of the run. Plain averaging, which nothing steers, judges best.
        data_folder: with the data set's archive; None downloads it.
        progress: is called with the step and the number of steps.

    Raises:
        ConfigError, DataError: if an argument cannot be used.
        Diverged: if the training diverges.
    """
    check_audit(config)
    training = Training(dataclasses.replace(config, engine="plain"), data_folder)
    criterion = watch(training)
    problem, accuracies = training.problem, [0.0]
    if problem.steps < 2:
        raise ConfigError(
            "passes must give an audit at least two steps, since the first one judges nothing; got "
            f"{config.passes:g}, which gives {problem.steps}. Set more passes, or a smaller b."
        )
    while training.step < problem.steps and not training.over:
        training.macro_batch()
        if problem.evaluation(training.step) or training.step == problem.steps:
            accuracies.append(float(training.evaluation()["heldout_accuracy"] or 0))
        progress(training.step, problem.steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gaf: .* labels look wrong")  # `closing_words` says it
        report = criterion.report()
        apart = criterion.separation() if criterion.score == "prototype" else None
    return AuditResult(problem, report, apart, max(accuracies))


def watch(training: Training) -> gaf.SampleAgreement:
    """What watches the run from now on.

    It judges by prototypes; by the loss where the model ends in no Linear layer, or the targets are
    no classes.
    """
    data, source = training.problem, training.source
    assert isinstance(source, OneByOne)
    loss, head = data.problem.loss, find_head(training.model, data.classes)
    criterion = gaf.SampleAgreement(
        (loss or nn.CrossEntropyLoss(reduction="none")) if data.classes else as_they_are,
        head,
        "loss" if head is None else "prototype",
        num_classes=data.classes or None,
        num_samples=len(data.train),
        weigh=False,
    ).to(training.device)
    own = None if data.classes else loss
    source.objective = WatchedObjective(source.objective, criterion, own)  # type: ignore[assignment]
    return criterion


def as_they_are(losses: Tensor, targets: Any) -> Tensor:
    """The criterion of targets that are no classes: it is given the losses."""
    return losses


def find_head(model: nn.Module, classes: int) -> nn.Linear | None:
    """The last Linear layer that gives a number for each class; None without one, or classes."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = [module for module in linear if classes and module.out_features == classes]
    return heads[-1] if heads else None


def check_audit(config: TrainConfig) -> None:
    if config.mixup or config.sam or config.audit_passes:
        raise ConfigError(
            "mixup, sam and audit_passes must be 0 for an audit, which judges single samples over "
            f"one run; got {config.mixup:g}, {config.sam:g} and {config.audit_passes:g}. "
            "Leave them out."
        )
