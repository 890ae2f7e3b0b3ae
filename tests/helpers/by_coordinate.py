"""Coordinate-wise rules written out on stacked rows in float64, with the policies they are of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gaf

Oracle = Callable[[Tensor], Tensor]  # rows (r, n), all present -> (n,)


def median(rows: Tensor) -> Tensor:
    return rows.quantile(0.5, dim=0)  # linear between the two in the middle


def trimmed(rows: Tensor) -> Tensor:
    return rows.sort(0).values[1:-1].mean(0)


def agreed(rows: Tensor, least: int = 2) -> Tensor:
    share = torch.stack([(rows > 0).sum(0), (rows < 0).sum(0)]).amax(0)
    return rows.mean(0) * (share >= least)


# the policy, the rule, and how many present rows it needs
RULES: dict[str, tuple[Callable[..., Any], Oracle, int]] = {
    "Median": (gaf.Median, median, 1),
    "TrimmedMean": (lambda **options: gaf.TrimmedMean(1, **options), trimmed, 3),
    "SignAgreement": (lambda **options: gaf.SignAgreement(2, **options), agreed, 2),
}


def expected_update(name: str, rows: Tensor) -> Tensor | None:
    """The update from the rows that are present, in float64; None for a skip."""
    _, rule, least = RULES[name]
    rows = rows.double()
    norms = rows.norm(dim=1)
    rows = rows[norms.isfinite() & (norms > 0)]
    return rule(rows) if len(rows) >= least else None
