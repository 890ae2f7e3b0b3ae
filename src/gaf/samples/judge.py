"""One batch: its labels, its scores, and the weights that follow from them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gaf.samples.agreement_checks import check_features, check_targets
from gaf.samples.class_statistics import ClassStatistics
from gaf.samples.ghost import GhostPass
from gaf.samples.scores import (
    class_votes,
    gram_cosines,
    head_cosines,
    prototype_cosines,
    prototype_margins,
)
from gaf.shapes import Bool, Float, Float64, Int

SHARPNESS = 4.0  # of the weights, per standard deviation
LARGEST_LOSS = 6.0
DOUBTFUL = 0.3  # share of a class that must look doubtful, and share that must not, for full effect
SHALLOW, DEEP = 0.6, 0.8  # mean depth of a class's doubtful samples, for no effect and the full one

VISITS_BEFORE = 2  # of a sample, until it is weighed
STEPS_BEFORE = 500  # the same where samples are not told apart


def is_warm(
    visits: Float[Tensor, " n"] | None, steps: Int[Tensor, ""], warmup: int | None
) -> Bool[Tensor, "..."]:
    """Whether the warm-up is over, for each sample or for all.

    Args:
        visits: of each sample before; None where samples are not told apart.
        steps: of the run, this one included.
        warmup: in steps; None for the defaults.
    """
    if visits is not None and warmup is None:
        return visits >= VISITS_BEFORE
    return steps > (STEPS_BEFORE if warmup is None else warmup)


class Caught:
    """Hook that keeps the head's last input, for one batch."""

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.features = args[0].detach()

    def take(self, n: int) -> Float[Tensor, "n p"]:
        features, self.features = self.features, None
        return check_features(features, n)


def gram_of_losses(model: nn.Module, losses: Float[Tensor, " n"]) -> Float64[Tensor, "n n"]:
    """K of the samples' gradients in all layers, by a backward pass of its own."""
    return GhostPass(model, losses, None, "SampleAgreement").run()


class Batch:
    """What a loss function is given.

    Args:
        outputs: (n, ...), outside of the graph.
        targets: classes (n,), probabilities (n, C), or others if there are no classes.
        losses: (n,), outside of the graph.
        classes: C; None for targets that are no classes.
        criterion: that made the losses.

    Attributes:
        gram: (n, n), K of the samples' gradients in all layers, if these vote.
        labels: (n,) int64 in [0, C): the observed class, 0 for a sample that does not count.
        counted: (n,), 1 for a sample that counts, 0 for one whose target is the ignored index.
    """

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor,
        losses: Float[Tensor, " n"],
        classes: int | None,
        criterion: Callable[..., Tensor],
    ) -> None:
        self.outputs, self.targets, self.losses, self.criterion = (
            outputs,
            targets,
            losses,
            criterion,
        )
        self.gram: Tensor | None = None
        self.labels = torch.zeros(len(losses), dtype=torch.int64, device=losses.device)
        self.counted = torch.ones_like(losses)
        if classes is not None:
            check_targets(targets, len(losses), classes)
            labels = targets.argmax(1) if targets.ndim == 2 else targets.long()
            counted = labels != getattr(criterion, "ignore_index", -100)
            self.labels, self.counted = labels * counted, counted.to(losses)

    @property
    def guesses(self) -> Int[Tensor, " n"]:
        """The network's own answers; the labels where the outputs are no scores of classes."""
        return self.outputs.argmax(1) if self.outputs.ndim == 2 else self.labels

    def cosines(self, features: Float[Tensor, "n p"]) -> Float[Tensor, "n n"]:
        """Of the samples' gradients, in all layers or in the head, whose input the features are."""
        if self.gram is None:
            return head_cosines(features.float(), self.errors())
        return gram_cosines(self.gram).to(self.losses.device, torch.float32)

    @torch.enable_grad()
    def errors(self) -> Float[Tensor, "n C"]:
        """The gradient of each loss by its sample's outputs."""
        outputs = self.outputs.clone().requires_grad_()
        losses = self.criterion(outputs, self.targets)
        return torch.autograd.grad(losses.sum(), outputs)[0].float()


def judge(
    batch: Batch, kind: str, caught: Caught, statistics: ClassStatistics, left_out: int | None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, "n p"]]:
    """Scores, the classes that the samples seem to have, and features of unit length (or none).

    A sample that cannot be judged has the score NaN.
    """
    n, guesses = len(batch.labels), batch.guesses
    unit = batch.losses.new_zeros(n, 0)
    if kind == "prototype":
        unit = normalize(caught.take(n).float(), dim=1)
        similarity = prototype_cosines(unit, statistics.prototypes(left_out))
        scores = prototype_margins(similarity, batch.labels)
        guesses = similarity.nan_to_num(nan=-torch.inf).argmax(1)
    elif kind == "vote":
        scores = class_votes(batch.cosines(caught.take(n)), batch.labels, batch.counted)
    else:
        scores = -batch.losses.float().clamp(max=LARGEST_LOSS)
    known = (batch.counted > 0) & scores.isfinite()
    return torch.where(known, scores, torch.nan), guesses, unit


def strength(doubtful: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """How far doubts in a class's labels are believed, in [0, 1], by the share of doubtful ones.

    If few are doubtful, the labels are right. If nearly all are, the judge cannot tell the class
    from others.
    """
    return (torch.minimum(doubtful, 1 - doubtful) / DOUBTFUL).clamp(max=1)


def belief(depth: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """How far the same doubts are believed, in [0, 1], by the mean depth of the doubtful samples.

    If they are less deep, they are hard, and their labels are right.
    """
    return ((depth - SHALLOW) / (DEEP - SHALLOW)).clamp(0, 1)


def soft_weights(
    scores: Float[Tensor, " n"],
    labels: Int[Tensor, " n"],
    statistics: ClassStatistics,
    has_classes: bool,
) -> Float[Tensor, " n"]:
    """1 - a (1 - sigmoid(4 (s - m) / d)).

    m and d are mean and deviation of the class's scores. a is `strength` for the share of the
    class's samples that seem to be of another class, times `belief` for their mean depth. Without
    classes a is 1, and m lower by 3 d. 1 where there is no score or deviation yet.
    """
    distance = (scores - statistics.mean[labels]) / statistics.deviation[labels]
    if has_classes:
        a = (strength(statistics.doubt) * belief(statistics.depth))[labels]
        weights = 1 - a * (1 - (SHARPNESS * distance).sigmoid())
    else:
        weights = (SHARPNESS * (distance + 3)).sigmoid()
    return torch.where(weights.isfinite(), weights, 1.0)
