"""What came out, in words: at each point of the grid, or as a count if the points are many."""

from collections.abc import Sequence

from gaf_lab.report.arms import (
    Arm,
    baseline_of,
    gaf_of,
    group_by_point,
    is_gaf,
    point_names,
    score_of,
)
from gaf_lab.report.measures import Measure, score_measures
from gaf_lab.report.pairs import can_be_control
from gaf_lab.report.statistics import MIN_SEEDS, Difference, paired_difference, spread_over_seeds
from gaf_lab.report.text import difference_as_text, listing, spread_as_text

SHOWN = 3  # points and arms that have sentences of their own; more are counted
WHEN = "At the last evaluation", "At the evaluation selected on noisy held-out labels"
REPLAYED = ("replay-skip", "random-subset")  # controls for fewer steps, and for smaller batches

Findings = list[tuple[str, list[str]]]  # a point of the grid in words, and its sentences


def findings(arms: list[Arm]) -> Findings:
    """What came out at each point; of more than SHOWN points, how many arms are better or worse."""
    groups = group_by_point(arms)
    if len(groups) > SHOWN:
        found = [("", overall_tally(arms))]
    else:
        names = point_names(groups)
        found = [(name, findings_at(group)) for name, group in zip(names, groups, strict=True)]
    return [(where, sentences) for where, sentences in found if sentences]


def findings_at(arms: list[Arm]) -> list[str]:
    """What came out at a point of the grid."""
    baseline = baseline_of(arms)
    focus, others = arms_of_interest(arms)
    sentences = [] if focus else sentences_on_one(baseline)
    for arm in focus:
        sentences += comparisons(arm, [one for one in others if can_be_control(one, arm, arms)])
    if any(arm not in (baseline, *focus, *others) for arm in arms):
        sentences += tally([(arm, baseline) for arm in arms])
    return sentences


def arms_of_interest(arms: list[Arm]) -> tuple[list[Arm], list[Arm]]:
    """The arms with sentences of their own, and those that they are compared with.

    Where these are many: GAF alone; the baseline and the controls that replay GAF's steps.
    """
    baseline = baseline_of(arms)
    rest = [arm for arm in arms if arm is not baseline]
    focus = [arm for arm in rest if is_gaf(arm)] or rest
    others = [baseline, *(arm for arm in rest if arm not in focus)]
    if len(focus) > SHOWN:
        gaf = gaf_of(arms)
        focus = [arm for arm in rest if arm is gaf]
    if len(others) > SHOWN:
        others = [baseline, *(arm for arm in others if arm.config.get("policy") in REPLAYED)]
    return focus, others


def sentences_on_one(arm: Arm) -> list[str]:
    """On an arm that is the only one of its point."""
    score = score_of([arm])
    last, _ = score_measures(score)
    spread = spread_over_seeds(arm, last)
    if spread is None:
        return [f"No test {score.name} was recorded yet."]
    mean, deviation = spread_as_text(spread, last)
    value = f"{mean}{'%' if score.share else ''} {deviation}".strip()
    return [
        f"{arm.method} has a test {score.name} of {value} at the last evaluation (n = {spread.n}). "
        "There is no other arm of the same data to compare it with."
    ]


def comparisons(arm: Arm, others: list[Arm]) -> list[str]:
    """The arm's score against the others', at the last evaluation and the selected one."""
    sentences, score = [], score_of([arm])
    for measure, when in zip(score_measures(score), WHEN, strict=True):
        gaps = [(paired_difference(arm, other, measure), other.method) for other in others]
        parts = [f"{amount(gap)} {name} {certainty(gap)}" for gap, name in gaps if gap]
        if parts:
            sentences.append(f"{when}, {arm.method}'s test {score.name} is {listing(parts)}.")
    missing = [
        one.method for one in others if paired_difference(arm, one, last_measure([arm])) is None
    ]
    if missing:
        sentences.append(
            f"{arm.method} cannot be compared with {listing(missing)}: "
            "there is no seed that both have finished."
        )
    return sentences


def last_measure(arms: Sequence[Arm]) -> Measure:
    """The score at the last evaluation."""
    return score_measures(score_of(arms))[0]


def amount(gap: Difference) -> str:
    """How far apart, and on which side."""
    number = gap.measure.unit == "number"
    size = f"{abs(gap.mean):.3g}" if number else f"{abs(gap.mean) * 100:.1f}"
    if not float(size):
        return "level with"
    return f"{size}{'' if number else ' points'} {'above' if gap.mean > 0 else 'below'}"


def certainty(gap: Difference) -> str:
    """The interval, and whether the difference is clear."""
    if gap.low is None or gap.high is None:
        return f"(n = {gap.n})"
    low, high = (difference_as_text(end, gap.measure).lstrip("+") for end in (gap.low, gap.high))
    interval = f"95% CI {low} to {high}, n = {gap.n}"
    if gap.clear:
        return f"({interval})"
    return f"({interval}: {'too few seeds' if gap.n < MIN_SEEDS else 'no clear difference'})"


def overall_tally(arms: list[Arm]) -> list[str]:
    """The tally of all arms, each against the baseline of its point."""
    groups = group_by_point(arms)
    return tally([(arm, baseline_of(group)) for group in groups for arm in group])


def tally(pairs: Sequence[tuple[Arm, Arm]]) -> list[str]:
    """How many of (arm, baseline) are clearly above, clearly below, and neither."""
    pairs = [(arm, baseline) for arm, baseline in pairs if arm is not baseline]
    if not pairs:
        return []
    name = score_of([arm for arm, _ in pairs]).name
    last = last_measure([arm for arm, _ in pairs])
    gaps = [paired_difference(arm, baseline, last) for arm, baseline in pairs]
    means = [gap.mean for gap in gaps if gap is not None and gap.clear]
    above, below = sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)
    names = listing(list(dict.fromkeys(baseline.kind for _, baseline in pairs)))
    return [
        f"Of {len(pairs)} arms compared with {names} in test {name} at the last evaluation, "
        f"{above} are clearly above, {below} clearly below, and {len(pairs) - above - below} "
        "neither. The best of many arms is partly the luckiest."
    ]
