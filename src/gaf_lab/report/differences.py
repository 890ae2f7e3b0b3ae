"""The paired differences on a page: text, verdict, and a bar on a common scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gaf_lab.report.arms import Arm, group_by_point, point_names, score_of
from gaf_lab.report.measures import Measure, compared_measures
from gaf_lab.report.pairs import pairs_at_point
from gaf_lab.report.statistics import MIN_SEEDS, Difference, paired_difference


@dataclass(frozen=True)
class Bar:
    """Zero, mean and interval on a scale of 0 to 100 that all differences of a measure share."""

    zero: float
    mean: float
    low: float | None
    high: float | None


def bars(gaps: Sequence[Difference]) -> list[Bar]:
    """Every difference on the common scale, which contains 0."""
    ends = [0.0]
    for gap in gaps:
        ends += [end for end in (gap.mean, gap.low, gap.high) if end is not None]
    low, width = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / width, 2)

    def place_end(value: float | None) -> float | None:
        return None if value is None else place(value)

    return [Bar(place(0), place(g.mean), place_end(g.low), place_end(g.high)) for g in gaps]


def reading(gap: Difference) -> str:
    """The difference in one word or two."""
    if gap.clear:
        return "higher" if gap.mean > 0 else "lower"
    return "too few seeds" if gap.n < MIN_SEEDS else "unclear"


def difference_groups(arms: list[Arm]) -> list[dict[str, Any]]:
    """The paired differences by measure."""
    compared = compared_measures(score_of(arms))
    groups = [{"label": one.label, "rows": difference_rows(arms, one)} for one in compared]
    return [group for group in groups if group["rows"]]


def difference_rows(arms: list[Arm], measure: Measure) -> list[dict[str, Any]]:
    """Each difference with its two methods, its point, and its bar."""
    groups = group_by_point(arms)
    rows = []
    for group, where in zip(groups, point_names(groups), strict=True):
        for one, other in pairs_at_point(group):
            gap = paired_difference(one, other, measure)
            if gap is not None:
                rows.append(difference_row(gap, one.method, other.method, where))
    for row, bar in zip(rows, bars([row["gap"] for row in rows]), strict=True):
        row["bar"] = bar
    return rows


def difference_row(gap: Difference, one: str, other: str, where: str) -> dict[str, Any]:
    """What the page shows of a difference. where: its point in words, if there are several."""
    at = f", {where}" if where else ""
    return {"gap": gap, "one": one, "other": other, "at": at, "verdict": reading(gap)}
