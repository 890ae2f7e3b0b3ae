"""TorchJD's Gramian weightings as policies, against TorchJD on the stacked rows."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gaf
from helpers.torchjd_rules import RULES, weighting
from test_weights import accumulated

aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")


def rows(k: int = 5, n: int = 40) -> Tensor:
    """They agree somewhat, and conflict here and there."""
    return torch.randn(k, n, dtype=torch.float64) + 0.3 * torch.randn(n, dtype=torch.float64)


def expected(name: str, matrix: Tensor) -> Tensor:
    """TorchJD's own weights of the stacked rows, times the rows."""
    return weighting(name)(matrix @ matrix.T) @ matrix


@pytest.mark.parametrize("name", RULES)
def test_the_update_is_torchjds(name: str) -> None:
    matrix = rows()
    update, decision = gaf.aggregate(matrix, weighting(name))
    assert decision.stepped
    # solvers amplify the last digits of K
    torch.testing.assert_close(update, expected(name, matrix), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_row_of_nan_is_left_out(name: str) -> None:
    matrix = rows()
    broken = torch.cat([matrix[:2], torch.full((1, 40), math.nan).double(), matrix[2:]])
    update, decision = gaf.aggregate(broken, weighting(name))
    assert not decision.accepted[2]
    torch.testing.assert_close(update, expected(name, matrix), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["MGDA", "IMTLG"])
def test_the_accumulator_steps_with_torchjds_update(name: str) -> None:
    matrix = rows().float()
    moved, acc = accumulated(matrix, weighting(name))
    assert acc.stats()["stepped"] == 1
    torch.testing.assert_close(moved, expected(name, matrix.double()).float(), rtol=1e-4, atol=1e-6)


TAKE_ROWS: list[tuple[Any, str]] = [
    (lambda: aggregation.MGDA(), r"Use MGDA\(\.\.\.\)\.gramian_weighting"),
    (lambda: aggregation.TrimmedMean(1), "TrimmedMean takes the rows themselves. Use one of its"),
    (lambda: aggregation.MoDoWeighting(), "MoDoWeighting takes the rows"),
]


@pytest.mark.parametrize(("make", "message"), TAKE_ROWS)
def test_what_takes_rows_is_refused(make: Any, message: str) -> None:
    """Given K, it would take it for the rows and answer with k numbers."""
    with pytest.raises(TypeError, match=message):
        gaf.aggregate(rows(), make())
