"""One batch: its labels, its scores, and the weights that follow from them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gaf.samples.agreement_checks import check_targets
from gaf.samples.caught import Caught
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
ONE_GROUP, TWO_GROUPS = 0.7, 0.75  # `separation` of the doubtful samples: no effect, full effect

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


def gram_of_losses(model: nn.Module, losses: Float[Tensor, " n"]) -> Float64[Tensor, "n n"]:
    """K of the samples' gradients in all layers, by a backward pass of its own."""
    return GhostPass(model, losses, None, "SampleAgreement").run()


class Batch:
    """What a loss function is given.

    Args:
        outputs: (n, ...), outside of the graph.
        targets: classes (n,), probabilities (n, C), or others if there are no classes.
        losses: (n, ...), outside of the graph: of each sample, or of each of its positions.
        classes: C; None for targets that are no classes.
        criterion: that made the losses.

    Attributes:
        losses: (n,), the mean over a sample's positions, without class weights.
        mass: (n,), what the criterion's own mean would divide by, as a mean over the positions:
            the weight of the target's class, 0 for an ignored target, otherwise 1.
        gram: (n, n), K of the samples' gradients in all layers, if these vote.
        labels: (n,) int64 in [0, C): the observed class, 0 for a sample that does not count.
        counted: (n,), 1 for a sample that counts, 0 for one whose target is the ignored index.
    """

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor,
        losses: Float[Tensor, "n ..."],
        classes: int | None,
        criterion: Callable[..., Tensor],
    ) -> None:
        self.outputs, self.targets, self.criterion = outputs, targets, criterion
        self.classes = classes
        self.mass = over_positions(position_masses(losses, targets, criterion))
        self.losses = over_positions(losses) / torch.where(self.mass > 0, self.mass, 1)
        self.gram: Tensor | None = None
        self.labels = torch.zeros(len(losses), dtype=torch.int64, device=losses.device)
        self.counted = (self.mass > 0).to(losses)
        if classes is not None:
            ignored = ignored_index(criterion)
            check_targets(targets, len(losses), classes, ignored)
            labels = targets.argmax(1) if targets.ndim == 2 else targets.long()
            self.labels = labels * (labels != ignored)

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


def over_positions(x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """The mean of what each sample has."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def position_masses(
    losses: Float[Tensor, "n ..."], targets: Tensor, criterion: Callable[..., Tensor]
) -> Float[Tensor, "n ..."]:
    """What each loss counts in the criterion's own mean, which divides by their sum.

    Where targets are classes, that is the weight of the class, and 0 for the ignored one.
    """
    masses = torch.ones_like(losses)
    if targets.shape != losses.shape or targets.is_floating_point():
        return masses
    ignored = targets == ignored_index(criterion)
    weight = getattr(criterion, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1:
        masses = weight.to(losses)[torch.where(ignored, 0, targets).long()]
    return torch.where(ignored, 0, masses)


def ignored_index(criterion: Callable[..., Tensor]) -> int:
    return int(getattr(criterion, "ignore_index", -100))


def judge(
    batch: Batch, kind: str, caught: Caught, statistics: ClassStatistics, left_out: int | None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, "n p"]]:
    """Scores, the classes that the samples seem to have, and features of unit length (or none).

    A sample that cannot be judged has the score NaN: so has one whose features are all zero or not
    finite, which are then zero.
    """
    guesses, unit = batch.guesses, batch.losses.new_zeros(len(batch.labels), 0)
    if kind == "prototype":
        unit = normalize(caught.take(batch.outputs).float(), dim=1)
        unit = torch.where(unit.isfinite().all(1, keepdim=True), unit, 0)
        similarity = prototype_cosines(unit, statistics.prototypes(left_out))
        scores = prototype_margins(similarity, batch.labels)
        scores = torch.where(unit.any(1), scores, torch.nan)
        guesses = similarity.nan_to_num(nan=-torch.inf).argmax(1)
    elif kind == "vote":
        scores = class_votes(batch.cosines(caught.take(batch.outputs)), batch.labels, batch.counted)
    else:
        largest = math.inf if batch.classes is None else LARGEST_LOSS
        scores = -batch.losses.float().clamp(max=largest)
    known = (batch.counted > 0) & scores.isfinite()
    return torch.where(known, scores, torch.nan), guesses, unit


def strength(doubtful: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """How far doubts in a class's labels are believed, in [0, 1], by the share of doubtful ones.

    If few are doubtful, the labels are right. If nearly all are, the judge cannot tell the class
    from others.
    """
    return (torch.minimum(doubtful, 1 - doubtful) / DOUBTFUL).clamp(max=1)


def belief(separation: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """How far doubts are believed, in [0, 1], by how far apart the doubtful samples' scores lie.

    If scores have one mode, the doubtful samples are the harder ones, and their labels are right.
    """
    return ((separation - ONE_GROUP) / (TWO_GROUPS - ONE_GROUP)).clamp(0, 1)


def soft_weights(
    scores: Float[Tensor, " n"],
    labels: Int[Tensor, " n"],
    statistics: ClassStatistics,
    has_classes: bool,
) -> Float[Tensor, " n"]:
    """1 - a (1 - sigmoid(4 (s - m) / d)).

    m and d are mean and deviation of the class's scores. a is `strength` for the share of the
    class's samples that seem to be of another class, times `belief` for their separation in all
    classes. Without classes a is 1, and m lower by 3 d. 1 where there is no score or deviation yet.
    """
    distance = (scores - statistics.mean[labels]) / statistics.deviation[labels]
    if has_classes:
        a = (strength(statistics.doubt) * belief(statistics.separation))[labels]
        weights = 1 - a * (1 - (SHARPNESS * distance).sigmoid())
    else:
        weights = (SHARPNESS * (distance + 3)).sigmoid()
    return torch.where(weights.isfinite(), weights, 1.0)
