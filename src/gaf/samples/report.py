"""From the history of the samples to a table of their labels' quality."""

from typing import Any

import torch
from torch import Tensor

from gaf.samples.agreement_checks import warn_of_most
from gaf.samples.history import DISAGREED, GUESS, LABEL, LOSS, SCORE, VISITS
from gaf.samples.judge import strength
from gaf.shapes import Bool, Float, Int


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
        columns["doubt"] = doubt_of(labels, columns["is_label_issue"])
    else:
        del columns["disagreement"]
    warn_of_most(int(columns["is_label_issue"].sum()), len(index))
    return {name: column.tolist() for name, column in columns.items()}


def doubt_of(labels: Int[Tensor, " N"], issues: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """0 for no issue, else `strength` for the share of issues with the label."""
    issue = issues.float()
    shares = torch.bincount(labels, weights=issue) / torch.bincount(labels)
    return issue * strength(shares[labels])


def quality_of(scores: Float[Tensor, " N"], kind: str) -> Float[Tensor, " N"]:
    """In [0, 1], high for a trusted label: (1 + score) / 2, or exp(-loss)."""
    return scores.clamp(max=0).exp() if kind == "loss" else (1 + scores.clamp(-1, 1)) / 2


def is_far(losses: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Losses that are far out, by Tukey's rule: three interquartile ranges above the quartile."""
    low, high = (float(losses.quantile(share)) for share in (0.25, 0.75))
    return losses > high + 3 * (high - low)
