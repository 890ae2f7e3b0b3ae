"""Weights of the samples in the loss: by `gaf.SampleAgreement`, or by an audit before a restart."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gaf
from gaf_lab.data.sampling import generator
from gaf_lab.settings.config import TrainConfig

SEPARATED = 0.7  # separation from which on suspects are believed; a normal distribution has less
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


def last_linear(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


class Agreement:
    """The weights of gaf.SampleAgreement, or the same in random order, which is the control.

    Args:
        config: with `agreement`, the score.
        samples: of the training set.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, samples: int) -> None:
        self.config = config
        plain = config.agreement == "plain-prototype"
        score: Any = "prototype" if plain else config.agreement
        self.criterion = gaf.SampleAgreement(
            CROSS_ENTROPY, last_linear(model), score, num_samples=samples, refine=not plain
        )

    def weights(self, scores: Tensor, y: Tensor, index: Tensor, step: int, i: int) -> Tensor:
        """(b,), of the samples of micro-batch i of a step; scores (b, classes) have no graph."""
        self.criterion(scores, y, index=index)
        weights = self.criterion.weights
        assert weights is not None
        if not self.config.shuffle_weights:
            return weights
        draw = generator(self.config.seed, "weights of samples", step, i)
        return weights[torch.randperm(len(weights), generator=draw).to(weights.device)]

    def findings(self) -> dict[str, Any]:
        """The running `separation`, and the mean weight of the last micro-batch's samples."""
        weights = self.criterion.weights
        if weights is None:
            return {}
        separation = float(self.criterion.statistics.separation)
        return {"separation": separation, "sample_weight": float(weights.mean())}

    def state_dict(self) -> dict[str, Any]:
        return self.criterion.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.criterion.load_state_dict(state)


class Audit:
    """Judges labels while a run averages; after its restart, suspects weigh less.

    Without suspects to believe there is no restart, and the run goes on as it is.

    Args:
        config: with `audit_passes`, `suspects` and `suspect_weight`.
        samples, classes: of the training set.

    Attributes:
        each: (samples,), the weights.
        watching: whether the run has not been started again: it averages.
        separation: of the suspects' scores, at the audit's end.
        ended: whether this object has seen the end.
    """

    separation: float | None = None
    ended = False

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        samples: int,
        classes: int,
        device: torch.device,
    ) -> None:
        self.config, self.watching = config, True
        self.each = torch.ones(samples, device=device)
        by_network = config.suspects == "network"
        self.criterion = gaf.SampleAgreement(
            CROSS_ENTROPY,
            None if by_network else last_linear(model),
            "loss" if by_network else "prototype",
            num_classes=classes,
            num_samples=samples,
            weigh=False,
            refine=config.suspects != "plain-prototype",
        )

    def weights(self, scores: Tensor, y: Tensor, index: Tensor, step: int, i: int) -> Tensor:
        """(b,), of the samples of a micro-batch; 1 during the audit."""
        if self.watching:
            self.criterion(scores, y, index=index)
        return self.each[index]

    def end(self) -> None:
        """Ends the audit, which fixes the weights, unless it has found nothing to act on.

        Suspects by prototypes, or as many at random, are nothing to act on where the scores are not
        separated.
        """
        self.ended = True
        if self.config.suspects not in ("network", "none"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "gaf: .* labels look wrong")  # `doubts` says it
                self.separation = self.criterion.separation()
            if self.separation < SEPARATED:
                return
        doubts = self.doubts().to(self.each.device)
        self.each = 1 - (1 - self.config.suspect_weight) * doubts
        self.watching = False

    def findings(self) -> dict[str, Any]:
        """After its end, its `separation`, and whether the run `restarted`."""
        if self.watching and self.separation is None:
            return {}
        return {"separation": self.separation, "restarted": not self.watching}

    def doubts(self) -> Tensor:
        """(samples,) in [0, 1]: 0 for no suspect."""
        report = self.criterion.report()
        found = torch.zeros(len(self.each))
        found[report["index"]] = torch.tensor(report["doubt"])
        if self.config.suspects == "random":
            draw = generator(self.config.seed, "random suspects")
            return found[torch.randperm(len(found), generator=draw)]
        return found * (self.config.suspects != "none")

    def state_dict(self) -> dict[str, Any]:
        return {
            "criterion": self.criterion.state_dict(),
            "each": self.each,
            "watching": self.watching,
            "separation": self.separation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.criterion.load_state_dict(state["criterion"])
        self.each.copy_(state["each"])
        self.watching, self.separation = state["watching"], state.get("separation")
        self.ended = False
