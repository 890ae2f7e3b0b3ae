"""The report in words: what was run, what came out, and what weakens the numbers."""

from collections.abc import Iterable

from gaf_lab.report.arms import Arm, group_by_point, score_of
from gaf_lab.report.conditions import shared_conditions
from gaf_lab.report.findings import Findings, findings, last_measure, overall_tally
from gaf_lab.report.measures import score_measures, status
from gaf_lab.report.pairs import differences_of
from gaf_lab.report.statistics import MIN_SEEDS
from gaf_lab.report.text import count_of, listing, percentage, unbreakable
from gaf_lab.settings.task_source import name_task

FEW = 6  # seeds: with fewer, an interval by bootstrap is too narrow, and the page says so
OPENING = 100  # words of the page's first paragraph, at most
ONE_SEED = "One seed (n = 1) cannot establish a difference."


def opening(arms: list[Arm]) -> tuple[str, Findings]:
    """The page's first paragraph, and the findings that it has no room for.

    The paragraph has at most OPENING words if possible: what was run, what came out as far as
    there is room, and the first caveat. If not all points of a grid fit, it counts instead.
    """
    first, found, doubts = what_was_run(arms), findings(arms), caveats(arms)
    everything = [*with_points(found), *doubts]
    if word_count([first, *everything]) <= OPENING:
        return unbreakable(" ".join([first, *everything])), []
    if len(group_by_point(arms)) > 1:
        shown = overall_tally(arms)
    else:
        shown = leading(everything, OPENING - word_count([first, *doubts[:1]]), doubts[:1])
    rest = [*found, ("", doubts)]
    return unbreakable(" ".join([first, *shown, *doubts[:1]])), not_shown(
        [*shown, *doubts[:1]], rest
    )


def leading(sentences: list[str], room: int, apart: list[str]) -> list[str]:
    """Those that fit into `room` words, in order, but not those `apart`."""
    shown: list[str] = []
    for sentence in sentences:
        if sentence not in apart and word_count([*shown, sentence]) <= room:
            shown.append(sentence)
    return shown


def not_shown(shown: list[str], found: Findings) -> Findings:
    """The sentences that are not among those shown; without points that have none left."""
    rest = []
    for where, sentences in found:
        left = [unbreakable(sentence) for sentence in sentences if sentence not in shown]
        if left:
            rest.append((where, left))
    return rest


def word_count(sentences: Iterable[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def with_points(found: Findings) -> list[str]:
    """All sentences. The first of each point begins with the point: "Noise rate 0.4: ..."."""
    sentences = []
    for where, (first, *others) in found:
        if where:
            first = f"{where[0].upper()}{where[1:]}: {lower_first(first)}"
        sentences += [first, *others]
    return sentences


def lower_first(sentence: str) -> str:
    """The sentence as it follows a colon. A name at its start keeps its capital."""
    if sentence.startswith(("At ", "Of ", "No ")):
        return sentence[0].lower() + sentence[1:]
    return sentence


def what_was_run(arms: list[Arm]) -> str:
    """Counts of runs, arms and seeds, and the main conditions that all runs share."""
    runs = [run for arm in arms for run in arm.runs]
    points, methods = group_by_point(arms), {arm.method for arm in arms}
    what = count_of(len(arms), "arm")
    if len(points) > 1:
        what = f"{count_of(len(methods), 'method')} at {len(points)} points"
    seeds = count_of(len({run.seed for run in runs}), "seed")
    return f"{count_of(len(runs), 'run')} of {what} over {seeds}{task(arms)}."


def task(arms: list[Arm]) -> str:
    """ " on mnist5k with 40% symmetric label noise, k = 8 micro-batches of b = 20 samples ..."."""
    shared = shared_conditions(arms)
    data = shared.get("dataset", shared.get("data"))
    if shared.get("task"):
        data = name_task(shared["task"])
    text = f" on {data}" if data else ""
    rate, noise = shared.get("noise_rate"), shared.get("noise")
    if noise and noise != "none":
        share = f"{percentage(rate, 0)}% " if isinstance(rate, float) and rate > 0 else ""
        text += f" with {share}{noise} label noise"
    if shared.get("k") and shared.get("b"):
        text += f", k = {shared['k']} micro-batches of b = {shared['b']} samples a step"
    return text


def caveats(arms: list[Arm]) -> list[str]:
    """What weakens the numbers: few seeds, and runs that are left out."""
    found, measures = [], score_measures(score_of(arms))
    if any(gap.n == 1 for measure in measures for gap in differences_of(arms, measure)):
        found.append(ONE_SEED)
    found += few_seeds_caveat(gap.n for gap in differences_of(arms, last_measure(arms)))
    left = []
    for arm in arms:
        if arm.finished_runs:
            left += [(run, arm.name) for run in arm.runs if run not in arm.finished_runs]
    if left:
        verb = "is" if len(left) == 1 else "are"
        runs = count_of(len(left), "unfinished run")
        found.append(f"{runs} {verb} left out of these numbers.")
    diverged = [name for run, name in left if status(run) == "diverged"]
    if diverged:
        names, runs = listing(sorted(set(diverged))), count_of(len(diverged), "run")
        found.append(f"{runs} diverged: leaving them out flatters {names}.")
    return found


def few_seeds_caveat(sizes: Iterable[int]) -> list[str]:
    """What few seeds do to intervals by bootstrap. sizes: the seeds behind each difference."""
    # with two seeds, each sentence says so
    least = min((n for n in sizes if n >= MIN_SEEDS), default=FEW)
    if least >= FEW:
        return []
    return [
        f"With {least} seeds these intervals are too narrow: an arm that changes nothing would "
        f"still have all its differences on one side in 1 case of {2 ** (least - 1)}."
    ]
