"""Sentences on a figure's page: the outcome of its runs, and the caption."""

from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import DISTANCES
from gaf_lab.paper.places import (
    Position,
    arms_by_position,
    differences_by_position,
    position_in_words,
)
from gaf_lab.paper.table import key_controls
from gaf_lab.records.run import Run
from gaf_lab.records.score import ACCURACY
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import BASELINE
from gaf_lab.report.findings import WHEN, amount, certainty
from gaf_lab.report.measures import Measure
from gaf_lab.report.sentences import few_seeds_caveat
from gaf_lab.report.text import MINUS, signed, unbreakable


def figure_caption(item: Item, runs: list[Run]) -> str:
    if item.kind == "plane" or not runs:
        return ""
    sentences = ["Lines: mean over seeds; dots: single seeds."]
    if item.kind == "curves":
        sentences = ["Bold: mean over seeds; thin: single runs."]
        if "test_accuracy" in item.keys:
            sentences.append("Circles: the evaluation that noisy held-out labels select.")
    if any(item.paper.values()):
        sentences.append("Diamonds: the paper's values.")
    if "distance_mean" in item.keys:
        sentences.append(distance_caption(runs))
    return " ".join(sentences)


def distance_caption(runs: list[Run]) -> str:
    """Which vectors the distances are between."""
    if all(run.header["config"]["k"] == 2 for run in runs):
        return "Distance: of a step's two micro-gradients, whatever the arm does with them."
    return (
        "Distance: to the running sum, which holds the accepted micro-gradients, under averaging "
        "all earlier ones; so the same micro-gradients have another distance in another arm, and "
        "arms do not compare in it."
    )


def describe_outcome(item: Item, runs: list[Run]) -> list[str]:
    """GAF against the others, and how far the distances reach."""
    found = []
    if "test_accuracy" in item.keys:
        for measure, when in zip(measures.score_measures(ACCURACY), WHEN, strict=True):
            gaps = differences_by_position(item, runs, measure)
            for other in (BASELINE, *key_controls(gap for _, gap in gaps)):
                of_pair = [(x, gap) for x, gap in gaps if (gap.arm, gap.other) == ("GAF", other)]
                if of_pair:
                    found.append(summarise_gaps(item, when, of_pair))
        found += few_seeds_caveat(
            gap.n for _, gap in differences_by_position(item, runs, measures.LAST)
        )
    if "distance_mean" in item.keys:
        found += describe_distances(item, runs)
    return [unbreakable(sentence) for sentence in found]


def summarise_gaps(item: Item, when: str, gaps: list[tuple[Position, st.Difference]]) -> str:
    """GAF against one other arm, over all places."""
    gap = gaps[0][1]
    if len(gaps) == 1:
        return f"{when}, {gap.arm} is {amount(gap)} {gap.other} {certainty(gap)}."
    above = sum(g.clear and g.mean > 0 for _, g in gaps)
    below = sum(g.clear and g.mean < 0 for _, g in gaps)
    ends = sorted(gaps, key=lambda one: one[1].mean)
    low, high = (
        f"{signed(g.mean * 100)} ({position_in_words(item, x)})" for x, g in (ends[0], ends[-1])
    )
    span = f"{when}, {gap.arm} {MINUS} {gap.other} runs from {low} to {high} points"
    if max(g.n for _, g in gaps) < st.MIN_SEEDS:
        return f"{span}; these are too few seeds to tell any difference."
    return (
        f"{span}; of {len(gaps)} differences {above} can be told to be above 0, {below} below, "
        f"{len(gaps) - above - below} neither."
    )


def describe_distances(item: Item, runs: list[Run]) -> list[str]:
    """The range of the cosine distances, over all arms."""
    values = {measure.name: means_of(item, runs, measure) for measure in DISTANCES}
    if not values["distance"]:
        return []
    low, high, least = min(values["distance"]), max(values["distance"]), min(values["lowest"])
    if low == high:
        span = f"The mean cosine distance of a run is {low[0]:.3f}"
    else:
        span = (
            f"The mean cosine distance of a run goes from {low[0]:.3f} "
            f"({low[2]}, {position_in_words(item, low[1])}) to {high[0]:.3f} "
            f"({high[2]}, {position_in_words(item, high[1])})"
        )
    return [f"{span}; the lowest evaluation has {least[0]:.3f}."]


def means_of(item: Item, runs: list[Run], measure: Measure) -> list[tuple[float, Position, str]]:
    """The mean over seeds of each arm at each place, with place and name."""
    found = []
    for x, arms in arms_by_position(item, runs).items():
        for arm in arms:
            spread = st.spread_over_seeds(arm, measure)
            if spread and spread.mean is not None:
                found.append((spread.mean, x, arm.name))
    return found
