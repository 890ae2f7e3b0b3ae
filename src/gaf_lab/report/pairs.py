"""Who is compared with whom: the pairs of arms whose difference a report shows.

Most reports have one baseline, one arm "GAF", its variants ("GAF, halving") and controls that
replay GAF's steps ("random subset"). Where GAF was run at several taus there are several arms of
the kind "GAF", and as many of each control: "random subset, tau 0.5" replays "GAF, tau 0.5".
"""

from gaf_lab.report.arms import Arm, baseline_of, gaf_of, group_by_point, is_gaf
from gaf_lab.report.fields import FILTER_FIELDS
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Difference, paired_difference

Pair = tuple[Arm, Arm]  # the difference is the first minus the second


def differences_of(arms: list[Arm], measure: Measure) -> list[Difference]:
    """The difference of each pair that has a seed in common."""
    gaps = (paired_difference(one, other, measure) for one, other in all_pairs(arms))
    return [gap for gap in gaps if gap is not None]


def all_pairs(arms: list[Arm]) -> list[Pair]:
    """The pairs of every point of the grid."""
    return [pair for group in group_by_point(arms) for pair in pairs_at_point(group)]


def pairs_at_point(arms: list[Arm]) -> list[Pair]:
    """The pairs among the arms of one point.

    - Each arm minus the baseline.
    - Each variant of GAF minus GAF, and GAF minus each other arm.
    - Each arm of GAF minus its namesake: "GAF, AdamW" minus "averaging, AdamW".

    A variant is not compared with the controls, which replay GAF's steps and not the variant's.
    So the number of pairs is proportional to the number of arms.
    """
    baseline = baseline_of(arms)
    others = [arm for arm in arms if arm is not baseline]
    return [
        *pairs_with_baseline(baseline, others, arms),
        *pairs_with_gaf(baseline, others, arms),
        *pairs_of_namesakes(baseline, others, arms),
    ]


def pairs_with_baseline(baseline: Arm, others: list[Arm], arms: list[Arm]) -> list[Pair]:
    found = []
    for arm in others:
        match = match_for(arm, baseline, arms)
        if match is not None:
            found.append((arm, match))
    return found


def pairs_with_gaf(baseline: Arm, others: list[Arm], arms: list[Arm]) -> list[Pair]:
    """None if GAF is the baseline itself: these pairs are those with the baseline."""
    gaf = gaf_of(arms)
    if gaf is None or gaf is baseline:
        return []
    found = []
    for arm in others:
        match = None if arm is gaf else match_for(arm, gaf, arms)
        if match is not None:
            found.append((arm, match) if is_gaf(arm) else (match, arm))
    return found


def pairs_of_namesakes(baseline: Arm, others: list[Arm], arms: list[Arm]) -> list[Pair]:
    """Arms whose kinds differ only before the first comma."""
    by_kind = {arm.kind: arm for arm in arms}
    found = []
    for arm in others:
        namesake = by_kind.get(f"{baseline.kind}, {arm.kind.partition(', ')[2]}")
        if is_gaf(arm) and namesake is not None:
            found.append((arm, namesake))
    return found


def match_for(arm: Arm, reference: Arm, arms: list[Arm]) -> Arm | None:
    """The arm of the reference's kind that `arm` is compared with.

    For an arm of GAF, the reference itself. For any other arm, the first of that kind whose
    control it can be; None if it is the control of another kind's arm alone.
    """
    if is_gaf(arm):
        return reference
    same_kind = [other for other in arms if other.kind == reference.kind]
    return next((other for other in same_kind if can_be_control(arm, other, arms)), None)


def can_be_control(control: Arm, arm: Arm, arms: list[Arm]) -> bool:
    """Whether `control` may be compared with `arm`: it does not replay another arm of its kind.

    A control has the filter settings of the run that it replays. Fields that it does not have
    count as equal, so that averaging may be compared with every arm.
    """
    if sum(other.kind == arm.kind for other in arms) == 1:
        return True
    return all(
        control.settings.get(field, value) == value
        for field, value in arm.settings.items()
        if field in FILTER_FIELDS
    )
