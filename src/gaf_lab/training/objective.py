"""The loss of a micro-batch: which technique it is, and how its samples are weighed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaf_lab.data.problem import Loss
from gaf_lab.data.run_data import RunData
from gaf_lab.data.trees import tensors_in, widen
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.techniques import (
    EarlyLearning,
    generalised_cross_entropies,
    generalised_cross_entropy,
    mix,
)
from gaf_lab.training.weighing import Agreement, Audit

Forward = Callable[[Any], Any]


class Objective:
    """The loss of a micro-batch under a config.

    Args:
        samples, classes: of the training set.
        model: whose last layer judges samples; None for a config that judges none.
        loss: the task's own; None: the config's, for classes.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: int,
        classes: int,
        device: torch.device,
        model: nn.Module | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.config, self.classes, self.loss = config, classes, loss
        self.early: EarlyLearning | None = None
        if config.loss == "elr":
            given = config.elr_beta, config.elr_lambda, device
            self.early = EarlyLearning(samples, classes, *given)
        self.weighing: Agreement | Audit | None = None
        if model is not None and config.agreement != "none":
            self.weighing = Agreement(config, model, samples)
        elif model is not None and config.audit_passes:
            self.weighing = Audit(config, model, samples, classes, device)

    def __call__(
        self, forward: Forward, x: Any, y: Any, index: Tensor, step: int, i: int
    ) -> Tensor:
        """Loss () of micro-batch i of a step: inputs x and targets y of samples `index`."""
        config = self.config
        if config.mixup:
            check_mixable(x)
            x, other, m = mix(x, y, config.mixup, config.seed, step, i)
            scores = widen(forward(x))
            return m * self.of(scores, y, index) + (1 - m) * self.of(scores, other, index)
        return self.weighed(widen(forward(x)), y, index, step, i)

    def weighed(self, scores: Any, y: Any, index: Tensor, step: int, i: int) -> Tensor:
        """Loss () of outputs: the mean over the samples, weighed if the config says so."""
        if self.weighing is None:
            return self.of(scores, y, index)
        weights = self.weighing.weights(scores.detach(), y, index, step, i)
        losses = self.each(scores, y, index)
        return (weights * losses).sum() / weights.sum().clamp_min(1e-6)

    def of(self, scores: Any, y: Any, index: Tensor) -> Tensor:
        """Mean loss () of outputs, which have at least the digits of float32.

        bfloat16 has too few digits for the logarithm of a probability near 1.
        """
        if self.loss is not None:
            return self._own(scores, y, index).mean()
        scores = check_scores(scores, self.classes)
        if self.early is not None:
            return self.early(scores, y, index)
        if self.config.loss == "gce":
            return generalised_cross_entropy(scores, y, self.config.gce_q)
        return cross_entropy(scores, y, label_smoothing=self.config.label_smoothing)

    def each(self, scores: Tensor, y: Any, index: Tensor) -> Tensor:
        """The losses (b,) of which `of` is the mean; in an audit cross-entropy, or the task's."""
        if self.loss is not None:
            return self._own(scores, y, index)
        if isinstance(self.weighing, Audit) and self.weighing.watching:
            return cross_entropy(scores, y, reduction="none")
        if self.config.loss == "gce":
            return generalised_cross_entropies(scores, y, self.config.gce_q)
        smoothing = self.config.label_smoothing
        losses = cross_entropy(scores, y, reduction="none", label_smoothing=smoothing)
        if self.early is not None:
            losses = losses + self.early.weight * self.early.regulariser(scores, index)
        return losses

    def _own(self, output: Any, y: Any, index: Tensor) -> Tensor:
        """The losses (b,) of the task's own loss."""
        assert self.loss is not None
        losses = self.loss(output, y)
        check_per_sample("loss", losses, len(index))
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ConfigError(
                "the task's loss must be computed from the model's output by operations that "
                "autograd sees; its losses do not require grad. Leave out detach, item, argmax "
                "and torch.no_grad, and train at least one parameter."
            )
        return losses

    def findings(self) -> dict[str, Any]:
        """For the records: what samples' weights went by, or an audit's end."""
        return {} if self.weighing is None else self.weighing.findings()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {} if self.early is None else {"targets": self.early.targets}
        if self.weighing is not None:
            state["weighing"] = self.weighing.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.early is not None:
            self.early.targets.copy_(state["targets"])
        if self.weighing is not None:
            self.weighing.load_state_dict(state["weighing"])


def make_objective(data: RunData, model: nn.Module | None = None) -> Objective:
    given = data.config, len(data.train), data.classes, data.device
    return Objective(*given, model, data.problem.loss)


def check_per_sample(name: str, values: Any, b: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (b,):
        seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(
            f"the task's {name} must give one number for each sample, ({b},); got {seen}. "
            "Take no mean over samples (reduction='none'), and one over all else."
        )


def check_scores(output: Any, classes: int) -> Tensor:
    """Refuses an output that is not a score for each class."""
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] >= classes:
        return output
    seen = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(
        f"the task's model must give a score for each class, (b, {classes}); got {seen}. "
        "Return Problem(classes=0) if the targets are no classes."
    )


def check_mixable(x: Any) -> None:
    """Refuses inputs that have no mean."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors_in(x))
        raise ConfigError(
            f"mixup needs inputs that are one tensor of floats; got {kinds}. Set it to 0."
        )
