"""Tables of docs/ in Markdown, made from records."""

from collections.abc import Iterable

from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, group_by_arm
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Spread, paired_difference, spread_over_seeds


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """head: the names of the columns with " | " between them."""
    lines = [f"| {head} |", "|---" * len(head.split(" | ")) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def by_name(runs: Iterable[Run]) -> dict[str, Arm]:
    return {arm.name: arm for arm in group_by_arm(runs)}


def mean_of(arm: Arm, measure: Measure) -> float:
    found = spread_over_seeds(arm, measure)
    assert found is not None
    return found.mean


def percent(arm: Arm, measure: Measure) -> str:
    """Mean ± standard deviation over the seeds; - without values."""
    found = spread_over_seeds(arm, measure)
    return "-" if found is None else with_deviation(found, 100, 1)


def with_deviation(found: Spread, scale: float, digits: int) -> str:
    text = f"{scale * found.mean:.{digits}f}"
    if found.deviation is None:
        return text
    return f"{text} ± {scale * found.deviation:.{digits}f}"


def points_between(arm: Arm, other: Arm, measure: Measure) -> str:
    """The paired difference of two arms with its interval, in points."""
    found = paired_difference(arm, other, measure)
    assert found is not None
    assert found.low is not None
    return f"{100 * found.mean:+.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def ratio(line: dict[str, float]) -> str:
    """A benchmark's median ratio with the range from the 10th to the 90th percentile."""
    return f"{line['ratio_median']:.3f} ({line['ratio_p10']:.2f} to {line['ratio_p90']:.2f})"
