"""gaf audit: trains a config while `gaf.SampleAgreement` watches, and reports suspect labels.

It watches without effect: the run is that of `gaf train`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import gaf
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
    """

    def __init__(self, objective: Any, criterion: gaf.SampleAgreement) -> None:
        self.objective, self.criterion = objective, criterion

    def __call__(self, forward: Any, x: Any, y: Tensor, index: Tensor, *at: int) -> Tensor:
        """The objective's own loss of samples `index`: inputs x and labels y."""

        def seen(x: Any) -> Any:
            outputs = forward(x)
            self.criterion(outputs.detach().float(), y, index=index)
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
    if not training.problem.classes:
        raise ConfigError(
            "an audit judges labels; the targets of this task are no classes. Use another task."
        )
    assert isinstance(training.source, OneByOne)
    criterion = watcher(training)
    training.source.objective = WatchedObjective(training.source.objective, criterion)  # type: ignore[assignment]
    problem, accuracies = training.problem, [0.0]
    while training.step < problem.steps and not training.over:
        training.macro_batch()
        if problem.evaluation(training.step) or training.step == problem.steps:
            accuracies.append(float(training.evaluation()["heldout_accuracy"] or 0))
        progress(training.step, problem.steps)
    return AuditResult(problem, criterion.report(), max(accuracies))


def watcher(training: Training) -> gaf.SampleAgreement:
    """Judges by prototypes, or by the loss where the model ends in no Linear layer."""
    head = find_head(training.model, training.problem.classes)
    return gaf.SampleAgreement(
        nn.CrossEntropyLoss(reduction="none"),
        head,
        "loss" if head is None else "prototype",
        num_classes=training.problem.classes,
        num_samples=len(training.problem.train),
        weigh=False,
    ).to(training.device)


def find_head(model: nn.Module, classes: int) -> nn.Linear | None:
    """The last Linear layer that gives a number for each class."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = [module for module in linear if module.out_features == classes]
    return heads[-1] if heads else None


def check_audit(config: TrainConfig) -> None:
    if config.mixup or config.sam or config.audit_passes:
        raise ConfigError(
            "mixup, sam and audit_passes must be 0 for an audit, which judges single samples over "
            f"one run; got {config.mixup:g}, {config.sam:g} and {config.audit_passes:g}. "
            "Leave them out."
        )
