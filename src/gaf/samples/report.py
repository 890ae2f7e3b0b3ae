"""From the history of the samples to a table of their labels' quality."""

from typing import Any

import torch
from torch import Tensor

from gaf.samples.agreement_checks import check_report, warn_of_most, warn_of_part
from gaf.samples.class_statistics import separation
from gaf.samples.history import DISAGREED, GUESS, LABEL, LOSS, SCORE, VISITS, History
from gaf.samples.judge import DOUBTFUL, strength
from gaf.samples.scores import depths_in_others
from gaf.samples.summing import Summing, ranks_of
from gaf.shapes import Bool, Float, Int

ENOUGH = 2 / 3  # depth for full belief in an issue
SHALLOW, DEEP = 0.6, 0.8  # mean depth of a label's issues, for no effect and the full one


def make_report(
    history: History, kind: str, classes: int | None, summing: Summing, gather: bool
) -> dict[str, list[Any]]:
    """The report of one rank, or of all; see `SampleAgreement.report`."""
    group = summing.group
    table, ranks = history.table, ranks_of(group)
    if gather and ranks > 1:
        table = history.gathered(group)
    elif ranks > 1:
        warn_of_part(ranks)
    check_report(bool((table[:, VISITS] > 0).any()))
    columns = report_columns(table.cpu(), kind, classes is not None)
    warn_of_most(columns["is_label_issue"])
    return columns


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
        "label_quality": quality_of(means, kind, classes),
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
    return {name: column.tolist() for name, column in columns.items()}


def separation_of(columns: dict[str, list[Any]], kind: str) -> float:
    """`separation` of the mean scores of issues and others, from a report's columns."""
    scores = torch.tensor(columns[kind], dtype=torch.float64)
    labels = torch.tensor(columns.get("given_label", [0] * len(scores)))
    issue = torch.tensor(columns["is_label_issue"]).double()
    each = [torch.ones_like(scores), scores, scores.square(), issue, scores * (1 - issue)]
    return float(separation(torch.stack([torch.bincount(labels, x) for x in each], 1)))


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
    min(3/2 depth, 1) f g: f is (1 - q) / 0.3, at most 1, and g rises from 0 to 1 as the mean depth
    of the label's issues does from 0.6 to 0.8: where they are less deep, they are hard.
    """
    counts, issue = torch.bincount(labels), issues.float()
    total = torch.bincount(labels, weights=issue)
    share = (total / counts)[labels]
    if depths is None:
        return issue * strength(share)
    mean = (torch.bincount(labels, weights=issue * depths) / total)[labels]
    fade = ((1 - share) / DOUBTFUL).clamp(max=1)
    deep = ((mean - SHALLOW) / (DEEP - SHALLOW)).clamp(0, 1)
    return torch.where(issues, (depths / ENOUGH).clamp(max=1) * fade * deep, 0)


def quality_of(means: Float[Tensor, "N 4"], kind: str, classes: bool) -> Float[Tensor, " N"]:
    """In [0, 1], high for a trusted label: (1 + score) / 2, or exp(-loss).

    Without classes a loss has no scale: the share of samples whose loss is at least as large.
    """
    if not classes:
        ordered = means[:, LOSS].sort().values
        return 1 - torch.searchsorted(ordered, means[:, LOSS].contiguous()) / len(means)
    if kind == "loss":
        return (-means[:, LOSS].clamp(min=0)).exp()
    return (1 + means[:, SCORE].clamp(-1, 1)) / 2


def is_far(losses: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Losses that are far out, by Tukey's rule: three interquartile ranges above the quartile."""
    ordered = losses.sort().values  # torch.quantile takes at most 2^24
    low, high = (quantile(ordered, share) for share in (0.25, 0.75))
    return losses > high + 3 * (high - low)


def quantile(ordered: Float[Tensor, " N"], share: float) -> Float[Tensor, ""]:
    """Between neighbours by linear interpolation."""
    place = share * (len(ordered) - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)
