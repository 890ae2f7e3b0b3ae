"""The loss of a micro-batch: which technique it is, and how its samples are weighed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.techniques import (
    EarlyLearning,
    Forward,
    generalised_cross_entropies,
    generalised_cross_entropy,
    mix,
)
from gaf_lab.training.weighing import Agreement, Audit


class Objective:
    """The loss of a micro-batch under a config.

    Args:
        samples, classes: of the training set.
        model: whose last layer judges samples; None for a config that judges none.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: int,
        classes: int,
        device: torch.device,
        model: nn.Module | None = None,
    ) -> None:
        self.config = config
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
        self, forward: Forward, x: Tensor, y: Tensor, index: Tensor, step: int, i: int
    ) -> Tensor:
        """Loss () of micro-batch i of a step: pictures x and labels y of samples `index`."""
        config = self.config
        if config.mixup:
            x, other, m = mix(x, y, config.mixup, config.seed, step, i)
            scores = forward(x).float()
            return m * self.of(scores, y, index) + (1 - m) * self.of(scores, other, index)
        scores = forward(x).float()
        if self.weighing is None:
            return self.of(scores, y, index)
        weights = self.weighing.weights(scores.detach(), y, index, step, i)
        losses = self.each(scores, y, index)
        return (weights * losses).sum() / weights.sum().clamp_min(1e-6)

    def of(self, scores: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Mean loss () of scores (b, classes) float32.

        bfloat16 has too few digits for the logarithm of a probability near 1.
        """
        if self.early is not None:
            return self.early(scores, y, index)
        if self.config.loss == "gce":
            return generalised_cross_entropy(scores, y, self.config.gce_q)
        return cross_entropy(scores, y, label_smoothing=self.config.label_smoothing)

    def each(self, scores: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """The losses (b,) of which `of` is the mean; in an audit, cross-entropy."""
        if isinstance(self.weighing, Audit) and self.weighing.watching:
            return cross_entropy(scores, y, reduction="none")
        if self.config.loss == "gce":
            return generalised_cross_entropies(scores, y, self.config.gce_q)
        smoothing = self.config.label_smoothing
        losses = cross_entropy(scores, y, reduction="none", label_smoothing=smoothing)
        if self.early is not None:
            losses = losses + self.early.weight * self.early.regulariser(scores, index)
        return losses

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
