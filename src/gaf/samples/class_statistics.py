"""Prototypes of the classes, and mean and spread of their samples' scores, over the last steps.

Everything is a ratio of sums that decay: so a rare class keeps its values, sums of several ranks
add up, and a rank's own part can be taken out again.
"""

import torch
from torch import Tensor, nn

from gaf.rules.slices import float64_device
from gaf.samples.float_buffers import FloatBuffers
from gaf.shapes import Float, Int

DECAY = 0.9  # a step in which the class occurs
FEWEST = 0.01  # of samples, decayed sums included, that a mean is taken of


class ClassStatistics(FloatBuffers):
    """Sums by class, as buffers.

    Args:
        classes: C.
        width: p, of the features; 0 for no prototypes.
        parts: of the prototypes' sums: one for each rank, if a rank's own is to be left out.
        device: of the buffers.

    Attributes:
        features: (parts, C, p + 1), the sum of unit-length features, and their number.
        scores: (C, 5), the number of scores, their sum, that of their squares; how many samples
            seemed to be of another class, and the sum of the others' scores.
    """

    features: Tensor
    scores: Tensor

    def __init__(self, classes: int, width: int, parts: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(parts, classes, width + 1, device=device))
        self.register_buffer("scores", torch.zeros(classes, 5, device=device))

    def prototypes(self, without: int | None = None) -> Float[Tensor, "C p"]:
        """The mean features of each class; NaN for a class without.

        without: the part to leave out.
        """
        total = self.features.sum(0)
        if without is not None:
            total = total - self.features[without]
        return total[:, :-1] / torch.where(total[:, -1:] > FEWEST, total[:, -1:], torch.nan)

    @property
    def mean(self) -> Float[Tensor, " C"]:
        """Of the scores; NaN for a class without."""
        return self.scores[:, 1] / self.scores[:, 0]

    @property
    def deviation(self) -> Float[Tensor, " C"]:
        """Of the scores."""
        square = self.scores[:, 2] / self.scores[:, 0]
        return (square - self.mean.square()).clamp_min(0).sqrt()

    @property
    def doubt(self) -> Float[Tensor, " C"]:
        """The share of the class's samples that seemed to be of another class."""
        return self.scores[:, 3] / self.scores[:, 0]

    @property
    def separation(self) -> Float[Tensor, ""]:
        """`separation` of the scores; 1 without prototypes, where scores have no zero."""
        return separation(self.scores) if self.features.shape[2] > 1 else self.scores.new_ones(())

    def sums_of(
        self,
        unit: Float[Tensor, "n p"],
        scores: Float[Tensor, " n"],
        labels: Int[Tensor, " n"],
        guesses: Int[Tensor, " n"],
        counted: Float[Tensor, " n"],
        part: int,
    ) -> Float[Tensor, " s"]:
        """A batch's contribution, one vector that adds up over ranks.

        Args:
            unit: features of unit length; one that is all zero is left out.
            scores: NaN for samples that were not judged, which are left out.
            labels: their classes.
            guesses: the classes that they seem to be of.
            counted: 1, or 0 for a sample that is left out of the prototypes too.
            part: this rank's.
        """
        features, known = torch.zeros_like(self.features), ~scores.isnan()
        if unit.shape[1]:
            counted = counted * unit.any(1)
        rows = nn.functional.pad(unit, (0, 1), value=1.0) * counted[:, None]
        features[part].index_add_(0, labels, rows.to(features))
        doubtful = (guesses != labels).to(scores)
        seen = [known.to(scores), scores, scores.square(), doubtful, scores * (1 - doubtful)]
        powers = torch.stack(seen, 1)
        moments = torch.zeros_like(self.scores)
        moments.index_add_(0, labels, torch.where(known[:, None], powers, 0).to(moments))
        return torch.cat([features.flatten(), moments.flatten()])

    def absorb(self, sums: Float[Tensor, " s"]) -> None:
        """Adds a step's contributions, of all ranks."""
        features, scores = sums.split([self.features.numel(), self.scores.numel()])
        decay_into(self.features, features.view_as(self.features))
        decay_into(self.scores, scores.view_as(self.scores))


def separation(sums: Float[Tensor, "C 5"]) -> Float[Tensor, ""]:
    """How far the doubtful samples' scores lie apart from the others', in [0, 1]; 0 if none do.

    The share of the variance of scores with the same label that lies between the two groups. If
    scores are symmetric around zero with one mode, it is at most 3/4 (a uniform distribution), and
    2 / pi for a normal one; two points have 1.

    Args:
        sums: of each class: the number of scores, their sum, that of their squares, the number of
            doubtful ones, and the sum of the others.
    """
    n, total, squares, doubtful, others = sums.to(float64_device(sums.device)).double().unbind(1)
    gap = others / (n - doubtful) - (total - others) / doubtful
    both = (doubtful > FEWEST) & (n - doubtful > FEWEST)  # less is what rounding has left
    between = torch.where(both, doubtful * (n - doubtful) / n * gap.square(), 0).sum()
    share = between / (squares - total.square() / n).nan_to_num(0).sum()
    return share.nan_to_num(0, posinf=0).clamp(0, 1).to(sums)


def decay_into(total: Tensor, new: Tensor) -> None:
    """total <- DECAY total + new, for the classes that are in `new`.

    A class is in it if its count is not zero: the last of features, the first of scores.
    """
    count = new[..., -1:].sum(0) if total.ndim == 3 else new[:, :1]
    total.copy_(torch.where(count > 0, DECAY * total + new, total))
