"""The doubt column of gaf.SampleAgreement's report, from a table of sums over visits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gaf.samples.report import report_columns, separation_of

# of each class 10 samples, and the score of those that seem to be of it
OWN = {0: 0.2, 1: 0.3, 2: 0.4}


def report(issues: Sequence[tuple[int, int, float]], visits: int = 4) -> dict[str, list[Any]]:
    """Of 30 samples; the first of a label are issues, given as (label, guess, mean score)."""
    rows = {label: [(label, label, score)] * 10 for label, score in OWN.items()}
    for label in OWN:
        found = [issue for issue in issues if issue[0] == label]
        rows[label][: len(found)] = found
    table = torch.zeros(30, 7)
    for i, (label, guess, score) in enumerate(row for each in rows.values() for row in each):
        table[i] = torch.tensor([visits, visits * score, 0, 0, label, guess, 1])
    return report_columns(table, "prototype", True)


def doubts(*issues: tuple[int, int, float]) -> torch.Tensor:
    return torch.tensor(report(issues)["doubt"][: len(issues)])


@pytest.mark.parametrize(
    ("scores", "doubt"),
    [
        ([-0.4], [1]),  # as deep in class 2 as its own samples
        ([-0.9], [1]),
        ([-0.8 / 3], [1 / 3]),  # two thirds as deep, which is enough; but the mean is 2/3 too
        ([-0.28], [0.5]),  # mean depth 0.7
        ([-0.2], [0]),  # hard
        ([-0.4, -0.4, -0.16], [1, 1, 0.6]),  # mean depth 0.8, the last 0.4
        ([-0.4, -0.2, -0.24], [0.5, 0.375, 0.45]),  # mean depth 0.7
    ],
)
def test_an_issue_is_believed_if_it_lies_deep_in_another_class(
    scores: list[float], doubt: list[float]
) -> None:
    found = doubts(*((0, 2, score) for score in scores))
    torch.testing.assert_close(found, torch.tensor(doubt).float())


def test_the_depth_is_that_in_the_class_that_it_seems_to_be_of() -> None:
    found = doubts((0, 1, -0.3), (0, 2, -0.12))  # depths 1 and 0.3
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25 * 0.45]))


@pytest.mark.parametrize(("issues", "doubt"), [(7, 1), (8, 2 / 3), (9, 1 / 3), (10, 0)])
def test_nothing_is_believed_where_nearly_a_whole_class_seems_to_be_of_others(
    issues: int, doubt: float
) -> None:
    found = doubts(*[(0, 2, -0.4)] * issues)
    torch.testing.assert_close(found, torch.full((issues,), float(doubt)))


def test_no_doubt_without_an_issue_or_without_samples_to_compare_with() -> None:
    columns = report([(0, 2, -0.4), (1, 0, -0.2)])
    assert [i for i, each in enumerate(columns["doubt"]) if each] == [0, 10]
    nobody = report([(0, 1, -0.4)] + [(1, 0, -0.4)] * 10)  # no sample is class 1's own
    assert nobody["doubt"][0] == 0


def test_the_separation_is_that_of_mean_scores() -> None:
    columns = report([(0, 2, -0.4), (0, 1, -0.2), (1, 0, -0.3)])
    between = 2 * 8 / 10 * (0.2 + 0.3) ** 2 + 1 * 9 / 10 * (0.3 + 0.3) ** 2
    within = (0.1**2 + 0.1**2) + 0  # of the first label's issues; the others are all alike
    found = separation_of(columns, "prototype")
    assert found == pytest.approx(between / (between + within), abs=1e-6)
    assert separation_of(report([]), "prototype") == 0
