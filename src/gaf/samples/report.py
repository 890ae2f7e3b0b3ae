"""From the history of the samples to a table of their labels' quality."""

from typing import Any

import torch
from torch import Tensor

from gaf.samples.agreement_checks import warn_of_most
from gaf.samples.history import DISAGREED, GUESS, LABEL, LOSS, SCORE, VISITS
from gaf.samples.judge import DOUBTFUL, belief, strength
from gaf.samples.scores import depths_in_others
from gaf.shapes import Bool, Float, Int

ENOUGH = 2 / 3  # depth for full belief in an issue


def report_columns(table: Float[Tensor, "N 7"], kind: str, classes: bool) -> dict[str, list[Any]]:
    """The report's columns; see `SampleAgreement.report`.

    Args:
        table: of the history.
        kind: the score.
        classes: whether the targets are classes.
    """
    index = (table[:, VISITS] > 0).nonzero()[:, 0]
    table = table[index]
    means = table[:, :LABEL] / table[:, VISITS, None]
    labels, guesses = table[:, LABEL].long(), table[:, GUESS].long()
    known = {"given_label": labels, "predicted_label": guesses} if classes else {}
    columns = {
        "index": index,
        **known,
        "label_quality": quality_of(means[:, SCORE], kind),
        "is_label_issue": labels != guesses if classes else is_far(means[:, LOSS]),
        kind: means[:, SCORE],
        "loss": means[:, LOSS],
        "disagreement": means[:, DISAGREED],
        "visits": table[:, VISITS].long(),
    }
    if classes:
        depths = depth_of(means[:, SCORE], labels, guesses) if kind == "prototype" else None
        columns["doubt"] = doubt_of(columns["is_label_issue"], labels, depths)
    else:
        del columns["disagreement"]
    warn_of_most(int(columns["is_label_issue"].sum()), len(index))
    return {name: column.tolist() for name, column in columns.items()}


def depth_of(
    scores: Float[Tensor, " N"], labels: Int[Tensor, " N"], guesses: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """`depths_in_others`, of mean scores."""
    own = (labels == guesses).float()
    n = int(torch.maximum(labels, guesses).max()) + 1
    sums = [torch.bincount(labels, weights=each, minlength=n) for each in (own * scores, own)]
    return depths_in_others(scores, labels, guesses, sums[0] / sums[1])


def doubt_of(
    issues: Bool[Tensor, " N"], labels: Int[Tensor, " N"], depths: Float[Tensor, " N"] | None
) -> Float[Tensor, " N"]:
    """How far each label is doubted, in [0, 1], 0 for no issue.

    `strength`, for the share q of issues among the samples with the label. With depths
    min(3/2 depth, 1) f g: f is (1 - q) / 0.3, at most 1, and g `belief` for the issues' mean depth.
    """
    counts, issue = torch.bincount(labels), issues.float()
    total = torch.bincount(labels, weights=issue)
    share = (total / counts)[labels]
    if depths is None:
        return issue * strength(share)
    mean = (torch.bincount(labels, weights=issue * depths) / total)[labels]
    fade = ((1 - share) / DOUBTFUL).clamp(max=1)
    return torch.where(issues, (depths / ENOUGH).clamp(max=1) * fade * belief(mean), 0)


def quality_of(scores: Float[Tensor, " N"], kind: str) -> Float[Tensor, " N"]:
    """In [0, 1], high for a trusted label: (1 + score) / 2, or exp(-loss)."""
    return scores.clamp(max=0).exp() if kind == "loss" else (1 + scores.clamp(-1, 1)) / 2


def is_far(losses: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Losses that are far out, by Tukey's rule: three interquartile ranges above the quartile."""
    low, high = (float(losses.quantile(share)) for share in (0.25, 0.75))
    return losses > high + 3 * (high - low)
