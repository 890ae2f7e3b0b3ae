"""What runs say together: a table for the terminal, and a page with figures. Both are functions of the records alone."""

import base64
import functools
import gzip
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaf_lab.progress import Tell, silent
from gaf_lab.records.run import Run
from gaf_lab.report import figures, measures, sheets
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import (
    Arm,
    baseline_of,
    gaf_of,
    group_by_arm,
    group_by_point,
    is_gaf,
    point_names,
)
from gaf_lab.report.fields import FILTER_FIELDS
from gaf_lab.report.figures import CROWD, clock
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Difference, Spread

if TYPE_CHECKING:
    from rich.table import Table

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
FEW = 6  # seeds: with fewer, an interval by bootstrap is too narrow, and the page says so
NARROW = 79  # columns of a terminal that the table fits into
SHOWN = 3  # arms that the summary speaks of one by one
OPENING = 100  # words that stand before the page's first table, at most
TALL = 1800  # pixels
COLOURS = 64  # of a picture inside a page
SPOKEN = (
    (measures.LAST, "At the last evaluation"),
    (measures.SELECTED, "At the evaluation selected on noisy held-out labels"),
)
BRIEF = {
    "selected": "selected",
    "last": "last",
    "memorised": "memorised",
    "acceptance": "accepted",
    "steps_taken": "steps",
    "seconds": "time",
}
MEANING = {  # a line on the page for each measure that it shows
    "selected": "the evaluation with the best accuracy on held-out labels, which are as noisy as the training labels.",
    "memorised": "of the training samples with a wrong label, the share predicted as that wrong label, at the end. Lower is better.",
    "corrected": "of the same samples, the share predicted as their true label, at the end. Higher is better.",
    "acceptance": "of all micro-gradients, the share that went into an update; those of a skipped step count as not accepted.",
    "steps_taken": "of all steps, each of k micro-gradients, the share on which the weights were updated; the others were skipped.",
}
ONE_SEED = "From one seed (n = 1), no difference can be told."
UNPAIRED = ("seed", "replay")  # differ from run to run by design
# the controls that tell agreement from fewer steps, and from smaller batches
REPLAYED = ("replay-skip", "random-subset")
CONTROLS = {
    "mean": "averages all micro-gradients at every step: plain data-parallel training.",
    "random-skip": "averages all micro-gradients, and takes a step with a fixed probability{step_probability}.",
    "replay-skip": "averages all micro-gradients, at the steps that GAF took in a recorded run: GAF's skips without its choice.",
    "random-subset": "averages random micro-gradients, as many as GAF accepted, at the steps that GAF took in a recorded run: "
    "GAF's skips and batch sizes without its choice.",
    "scaled-lr": "averages all micro-gradients at every step, its learning rate times the share that GAF accepted in a recorded run.",
}
STARTS = {
    "best": ", from the start that most agree with",
    "worst": ", from the start that fewest agree with",
}
# field -> what leaves it idle, and what it does otherwise
TECHNIQUES: dict[str, tuple[Any, str]] = {
    "loss": ("cross-entropy", "trained with the loss {!r}"),
    "label_smoothing": (0.0, "labels smoothed by {:g}"),
    "mixup": (0.0, "pictures mixed with alpha = {:g}"),
    "sam": (0.0, "gradients taken at a distance of {:g} uphill (SAM)"),
    "ema": (0.0, "evaluated at an average of the weights with decay {:g}"),
    "early_stopping": (
        0,
        "ends after {} evaluations without a better held-out accuracy, at its best weights",
    ),
}


# --- numbers as text ---------------------------------------------------------------------------------------------


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage, without its sign %, and without a negative zero."""
    return signed(value * 100, digits).lstrip("+")


def signed(value: float, digits: int = 1) -> str:
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text if float(f"{value:.{digits}f}") else text[1:]


def spelled(found: Spread | None, measure: Measure, second: float) -> tuple[str, str]:
    """Mean and deviation, a share in %, a time in units of `second` seconds; the deviation empty for one seed."""
    if found is None:
        return NONE, ""
    scale, digits = {"share": (100.0, 1), "distance": (1.0, 3), "seconds": (1 / second, 1)}[
        measure.unit
    ]
    deviation = "" if found.deviation is None else f"± {found.deviation * scale:.{digits}f}"
    return f"{found.mean * scale:.{digits}f}", deviation


def headings(of: list[Arm]) -> tuple[list[tuple[Measure, str]], float]:
    """The measures that some arm has, each with its heading and unit, and the length of the time unit in seconds."""
    times = [
        value for arm in of if (value := st.spread_over_seeds(arm, measures.SECONDS)) is not None
    ]
    unit, second = clock(max((one.mean for one in times), default=0.0))
    had = [
        measure
        for measure in measures.MEASURES
        if any(st.spread_over_seeds(arm, measure) for arm in of)
    ]
    return [
        (measure, f"{measure.label} ({'%' if measure.unit == 'share' else unit})")
        for measure in had
    ], second


def marked(arm: Arm) -> str:
    """The arm's name, with a star where its numbers are those of unfinished runs."""
    return with_star(arm.name, arm)


def with_star(name: str, arm: Arm) -> str:
    return name + ("" if arm.finished_runs else " *")


def table(runs: list[Run]) -> "Table":
    """One row per arm, mean ± sample standard deviation over seeds; the paired differences beneath. Raises ValueError without runs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    of = arms_of(runs)
    columns, second = headings(of)
    columns = [(measure, heading) for measure, heading in columns if measure.name in BRIEF]
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        header_style="bold",
        caption_justify="left",
    )
    notes = reading(of)
    shown.caption, shown.min_width = (
        Text("\n".join(notes), style="dim"),
        min(NARROW, max(map(len, notes))),
    )
    shown.add_column("arm", overflow="fold")
    shown.add_column("n", justify="right")
    for measure, heading in columns:
        unit = heading[heading.rindex("(") :]
        shown.add_column(
            BRIEF[measure.name] + (f" {unit}" if measure is measures.SECONDS else ""),
            justify="right",
            no_wrap=True,
        )
    groups = group_by_point(of)
    for where, group in zip(point_names(groups), groups, strict=True):
        if where:
            shown.add_row(Text(where, style="bold"))
        there = [any(st.spread_over_seeds(arm, measure) for arm in group) for measure, _ in columns]
        for arm in group:
            cells = [
                cell(arm, measure, second) if some else ""
                for (measure, _), some in zip(columns, there, strict=True)
            ]
            shown.add_row(Text(with_star(arm.method, arm)), str(len(arm.seeds)), *cells)
    return shown


def cell(arm: Arm, measure: Measure, second: float) -> str:
    """The mean; for accuracies with the deviation."""
    mean, deviation = spelled(st.spread_over_seeds(arm, measure), measure, second)
    return f"{mean} {deviation}".strip() if measure in (measures.SELECTED, measures.LAST) else mean


def reading(of: list[Arm]) -> list[str]:
    """How to read the table, and the differences at the last evaluation."""
    scattered = any(
        found.n > 1
        for arm in of
        for measure in (measures.SELECTED, measures.LAST)
        if (found := st.spread_over_seeds(arm, measure))
    )
    lines = [
        "in %, means over n seeds; selected, last: test accuracy"
        + (" ± standard deviation" if scattered else "")
    ]
    if any(not arm.finished_runs for arm in of):
        lines.append("* unfinished runs only, as far as they got")
    gaps = differences(of, measures.LAST)
    if len(gaps) > 2 * CROWD:
        return lines + overall_tally(of) + ["Every difference stands on the page."]
    lines += [
        f"{gap.arm} {MINUS} {gap.other}, last: {signed(gap.mean * 100)} {certainty(gap)}"
        for gap in gaps
    ]
    return lines + ([ONE_SEED] if any(gap.n == 1 for gap in gaps) else [])


def arms_of(runs: list[Run]) -> list[Arm]:
    if not runs:
        raise ValueError(
            "report: must have at least one run; got none. Give the folder that `gaf train --out` wrote."
        )
    return group_by_arm(runs)


# --- sentences ---------------------------------------------------------------------------------------------------


def pairs(of: list[Arm]) -> list[tuple[Arm, Arm]]:
    """What is compared, point by point of the grid."""
    return [pair for group in group_by_point(of) for pair in pairs_at(group)]


def pairs_at(of: list[Arm]) -> list[tuple[Arm, Arm]]:
    """What is compared at a point, a number of pairs that grows as the arms do.

    Each arm with the baseline; GAF with each other arm, its variants taken the other way round; and two arms that differ
    only before a comma, as "GAF, AdamW" and "averaging, AdamW". Not each variant with each control: a control replays
    GAF's steps, not the variant's.
    """
    baseline, gaf = baseline_of(of), gaf_of(of)
    rest = [arm for arm in of if arm is not baseline]
    found = [(arm, one) for arm in rest if (one := partner(baseline, arm, of)) is not None]
    for arm in rest:
        if (
            gaf is not None
            and gaf not in (baseline, arm)
            and (one := partner(gaf, arm, of)) is not None
        ):
            found.append((arm, one) if is_gaf(arm) else (one, arm))
    names = {arm.kind: arm for arm in of}
    namesakes = [
        (arm, names.get(f"{baseline.kind}, {arm.kind.partition(', ')[2]}"))
        for arm in rest
        if is_gaf(arm)
    ]
    return found + [(arm, other) for arm, other in namesakes if other is not None]


def partner(one: Arm, other: Arm, of: list[Arm]) -> Arm | None:
    """The first namesake of `one` that the other can be compared with; None where it is the control of none of them."""
    if is_gaf(other):
        return one
    return next((arm for arm in of if arm.kind == one.kind and meet(arm, other, of)), None)


def meet(gaf: Arm, other: Arm, of: list[Arm]) -> bool:
    """Whether the other is no control of a namesake: where GAF was run at several taus, each control replays one of them."""
    alone = sum(arm.kind == gaf.kind for arm in of) == 1
    return alone or all(
        other.settings.get(field, value) == value
        for field, value in gaf.settings.items()
        if field in FILTER_FIELDS
    )


def differences(of: list[Arm], measure: Measure) -> list[Difference]:
    """Those of the pairs that have a seed in common."""
    return [
        gap
        for one, other in pairs(of)
        if (gap := st.paired_difference(one, other, measure)) is not None
    ]


def summary(of: list[Arm]) -> str:
    """What was run, what came out, and what cannot be told."""
    return unbroken(" ".join(sentences(of)))


def sentences(of: list[Arm]) -> list[str]:
    groups = group_by_point(of)
    each = [sentence for group in groups for sentence in outcome(group)]
    return [setting(of), *(each if len(groups) <= SHOWN else overall_tally(of)), *caveats(of)]


def opening(of: list[Arm]) -> tuple[str, list[str]]:
    """The page's first paragraph, of at most OPENING words where that is possible; and the sentences that did not go in.

    It says what was run, what came out, as far as there is room, and the first caveat. Of several points of a grid it counts.
    """
    first, *found = sentences(of)
    caveat = caveats(of)[:1]
    told = [] if len(group_by_point(of)) == 1 else overall_tally(of)
    for sentence in found if not told else ():
        if length([first, *told, sentence, *caveat]) <= OPENING and sentence not in caveat:
            told.append(sentence)
    shown = found if length([first, *found]) <= OPENING else [*told, *caveat]
    rest = [sentence for sentence in found if sentence not in shown]
    return unbroken(" ".join([first, *shown])), list(map(unbroken, rest))


def length(sentences: Iterable[str]) -> int:
    """In words."""
    return sum(len(sentence.split()) for sentence in sentences)


def overall_tally(of: list[Arm]) -> list[str]:
    """How many arms are above, below and level with the baseline of their point."""
    return tally([(arm, baseline_of(group)) for group in group_by_point(of) for arm in group])


def outcome(of: list[Arm]) -> list[str]:
    """What came out at a point of the grid."""
    baseline = baseline_of(of)
    focus, others = spoken(of)
    sentences = [] if focus else alone(baseline)
    sentences += [
        sentence
        for arm in focus
        for sentence in against(arm, [other for other in others if meet(arm, other, of)])
    ]
    untold = [arm for arm in of if arm not in (baseline, *focus, *others)]
    return sentences + (tally([(arm, baseline) for arm in of]) if untold else [])


def spoken(of: list[Arm]) -> tuple[list[Arm], list[Arm]]:
    """The arms that the summary speaks of, and those that it compares them with: GAF, the baseline and the controls where they are many."""
    baseline = baseline_of(of)
    rest = [arm for arm in of if arm is not baseline]
    focus = [arm for arm in rest if is_gaf(arm)] or rest
    others = [baseline, *(arm for arm in rest if arm not in focus)]
    if len(focus) > SHOWN:
        focus = [gaf] if (gaf := gaf_of(of)) in rest and gaf is not None else []
    if len(others) > SHOWN:
        others = [baseline, *(arm for arm in others if arm.config.get("policy") in REPLAYED)]
    return focus, others


def unbroken(text: str) -> str:
    """Without line breaks around "=", nor within "95% CI"."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}").replace(
        "95% CI ", "95%\N{NO-BREAK SPACE}CI "
    )


def setting(of: list[Arm]) -> str:
    """What was run: counts, and the conditions that all runs share."""
    runs = [run for arm in of for run in arm.runs]
    common = {key: values[0] for key, values in gathered(of).items() if uniform(values)}
    seeds = sorted({run.seed for run in runs})
    data = common.get("dataset", common.get("data"))
    on = f" on {data}" if data else ""
    rate, noise = common.get("noise_rate"), common.get("noise")
    if noise and noise != "none":
        on += (
            f" with {percent(rate, 0)}% {noise} label noise"
            if isinstance(rate, float) and rate > 0
            else f" with {noise} label noise"
        )
    if common.get("k") and common.get("b"):
        on += f", k = {common['k']} micro-batches of b = {common['b']} samples a step"
    points, methods = group_by_point(of), {arm.method for arm in of}
    what = (
        f"{count(len(methods), 'method')} at {len(points)} points"
        if len(points) > 1
        else count(len(of), "arm")
    )
    return f"{count(len(runs), 'run')} of {what} over {count(len(seeds), 'seed')}{on}."


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def alone(arm: Arm) -> list[str]:
    found = st.spread_over_seeds(arm, measures.LAST)
    if found is None:
        return ["No test accuracy was recorded yet."]
    value, deviation = spelled(found, measures.LAST, 1.0)
    return [f"{arm.name} has a test accuracy of {value}%{' ' + deviation if deviation else ''} at the last evaluation (n = {found.n}). "
            "There is no other arm of the same data to compare it with."]  # fmt: skip


def against(arm: Arm, others: list[Arm]) -> list[str]:
    """A sentence on the arm's test accuracy against the others', at the last evaluation and at the selected one."""
    found = []
    for measure, when in SPOKEN:
        gaps = [
            gap
            for other in others
            if (gap := st.paired_difference(arm, other, measure)) is not None
        ]
        if gaps:
            found.append(
                f"{when}, {arm.name}'s test accuracy is {listing([f'{amount(gap)} {gap.other} {certainty(gap)}' for gap in gaps])}."
            )
    missing = [
        other.name for other in others if st.paired_difference(arm, other, measures.LAST) is None
    ]
    if missing:
        found.append(
            f"{arm.name} cannot be compared with {listing(missing)}: there is no seed that both have finished."
        )
    return found


def listing(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def amount(gap: Difference) -> str:
    """How far, and on which side."""
    size = f"{abs(gap.mean) * 100:.1f}"
    return (
        "level with" if not float(size) else f"{size} points {'above' if gap.mean > 0 else 'below'}"
    )


def certainty(gap: Difference) -> str:
    """The interval, and whether it tells a difference."""
    if gap.low is None or gap.high is None:
        return f"(n = {gap.n})"
    interval = f"95% CI {signed(gap.low * 100).lstrip('+')} to {signed(gap.high * 100).lstrip('+')}, n = {gap.n}"
    if gap.clear:
        return f"({interval})"
    why = "too few seeds to tell a difference" if gap.n < st.ENOUGH else "no difference can be told"
    return f"({interval}: {why})"


def tally(found: list[tuple[Arm, Arm]]) -> list[str]:
    """For many arms, each with its baseline: how many are above, below and untold."""
    compared = [(arm, baseline) for arm, baseline in found if arm is not baseline]
    if not compared:
        return []
    gaps = [
        gap
        for arm, baseline in compared
        if (gap := st.paired_difference(arm, baseline, measures.LAST)) is not None
    ]
    above, below = (
        sum(gap.clear and gap.mean > 0 for gap in gaps),
        sum(gap.clear and gap.mean < 0 for gap in gaps),
    )
    names = listing(list(dict.fromkeys(baseline.kind for _, baseline in compared)))
    return [f"Of {len(compared)} arms compared with {names} in test accuracy at the last evaluation, {above} can be told to be above, "
            f"{below} below, and {len(compared) - above - below} neither. The best of many arms is partly the luckiest."]  # fmt: skip


def caveats(of: list[Arm]) -> list[str]:
    """What weakens the numbers: few seeds, and runs that are left out."""
    found = (
        [ONE_SEED]
        if any(gap.n == 1 for measure, _ in SPOKEN for gap in differences(of, measure))
        else []
    )
    found += narrow([gap.n for gap in differences(of, measures.LAST)])
    left = [
        run for arm in of for run in arm.runs if arm.finished_runs and run not in arm.finished_runs
    ]
    if left:
        found.append(
            f"{count(len(left), 'unfinished run')} {'is' if len(left) == 1 else 'are'} left out of these numbers."
        )
    diverged = [
        arm.name
        for arm in of
        for run in arm.runs
        if run in left and measures.status(run) == "diverged"
    ]
    if diverged:
        found.append(
            f"{count(len(diverged), 'run')} diverged: leaving them out flatters {listing(sorted(set(diverged)))}."
        )
    return found


def narrow(sizes: Iterable[int]) -> list[str]:
    """What few seeds do to intervals by bootstrap, from the seeds behind each difference."""
    # with two, each sentence says so
    least = min((n for n in sizes if n >= st.ENOUGH), default=FEW)
    if least >= FEW:
        return []
    return [f"With {least} seeds these intervals are too narrow: an arm that changes nothing would still have all its "
            f"differences on one side in 1 case of {2 ** (least - 1)}."]  # fmt: skip


def described(arm: Arm) -> str:
    """One line on what the arm does with the k micro-gradients, and what else it does about wrong labels."""
    config = arm.config
    used = [
        text.format(config[name])
        for name, (idle, text) in TECHNIQUES.items()
        if config.get(name, idle) != idle
    ]
    return aggregated(arm) + (f" Beside that: {listing(used)}." if used else "")


def aggregated(arm: Arm) -> str:
    config = arm.config
    policy = config.get("policy") or ("gaf" if is_gaf(arm) else None)
    if policy == "gaf":
        tau, least = config.get("tau"), config.get("min_accepted")
        near = "whose cosine distance to their running sum is at most τ" + (
            "" if tau is None else f" = {tau:g}"
        )
        fewer = "too few agree" if least is None else f"fewer than {least} agree"
        how = STARTS.get(str(config.get("start")), "") + (
            ", halving the sum at each" if config.get("average") == "halving" else ""
        )
        where = " in each bucket of parameters by itself" if config.get("scope") == "group" else ""
        return f"averages the micro-gradients {near}, one after the other{how}, and skips the step where {fewer}{where}."
    if policy not in CONTROLS:
        return f"policy {policy!r}." if policy else "its policy was not recorded."
    chance = None if config.get("replay") else config.get("step_probability")
    told = (
        ", GAF's in a recorded run"
        if config.get("replay")
        else ""
        if chance is None
        else f" of {chance:g}"
    )
    return CONTROLS[policy].format(step_probability=told)


# --- conditions --------------------------------------------------------------------------------------------------


def flat(run: Run) -> dict[str, Any]:
    """Under what a run ran, by name: config, versions, machine, commit."""
    found = {key: value for key, value in run.header["config"].items() if key not in UNPAIRED}
    for part in ("versions", "machine"):
        inner = run.header.get(part)
        found |= inner if isinstance(inner, dict) else {part: inner} if inner else {}
    return found | {key: run.header[key] for key in ("commit",) if run.header.get(key)}


def gathered(of: list[Arm]) -> dict[str, list[Any]]:
    """For each condition its value in every run, None where a run does not have it."""
    rows = [flat(run) for arm in of for run in arm.runs]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def uniform(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def written(value: Any) -> str:
    """A condition as text."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(written, value))
    return str(value)


def conditions(of: list[Arm]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Those that all runs share, (name, value), and the others, (name, value in each arm)."""
    common, differing = [], []
    for key, values in gathered(of).items():
        name = key.replace("_", " ")
        if uniform(values):
            common += [(name, written(values[0]))] if values[0] is not None else []
        else:
            each = [dict.fromkeys(written(flat(run).get(key)) for run in arm.runs) for arm in of]
            differing.append((name, [" / ".join(texts) for texts in each]))
    return common, differing


def commands(runs: Iterable[Run]) -> list[str]:
    """The commands that made the runs, each once."""
    found = [run.header.get("command") for run in runs]
    return list(
        dict.fromkeys(
            " ".join(map(str, one)) if isinstance(one, list) else str(one) for one in found if one
        )
    )


# --- the page ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A difference on a scale of 0 to 100 across all differences of its measure: zero, mean, interval."""

    zero: float
    mean: float
    low: float | None
    high: float | None


def bars(gaps: list[Difference]) -> list[Bar]:
    """Every difference on the common scale, which holds 0."""
    ends = [0.0, *(end for gap in gaps for end in (gap.mean, gap.low, gap.high) if end is not None)]
    low, width = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / width, 2)

    return [
        Bar(
            place(0),
            place(g.mean),
            None if g.low is None else place(g.low),
            None if g.high is None else place(g.high),
        )
        for g in gaps
    ]


def verdict(gap: Difference) -> str:
    if gap.clear:
        return "higher" if gap.mean > 0 else "lower"
    return "too few seeds" if gap.n < st.ENOUGH else "cannot be told"


def compared(of: list[Arm]) -> list[dict[str, Any]]:
    """The paired differences, by measure."""
    groups = group_by_point(of)
    places = list(zip(groups, at_points(groups), strict=True))
    found = [
        {"label": measure.label, "rows": compared_at(places, measure)}
        for measure in measures.COMPARED
    ]
    return [group for group in found if group["rows"]]


def compared_at(places: list[tuple[list[Arm], str]], measure: Measure) -> list[dict[str, Any]]:
    """Each difference with its two methods, where it holds, and its bar."""
    found = [
        (gap, one.method, other.method, at)
        for group, at in places
        for one, other in pairs_at(group)
        if (gap := st.paired_difference(one, other, measure)) is not None
    ]
    scale = bars([gap for gap, *_ in found])
    return [
        {"gap": gap, "one": one, "other": other, "at": at, "bar": bar, "verdict": verdict(gap)}
        for (gap, one, other, at), bar in zip(found, scale, strict=True)
    ]


def at_points(groups: list[list[Arm]]) -> list[str]:
    """What follows a name at each point of the grid: ", noise rate 0.4"."""
    return [f", {name}" if name else "" for name in point_names(groups)]


def listed(run: Run, arm: Arm) -> dict[str, Any]:
    """A run in one row, under its arm's name."""
    passes, last = measures.last_value(run, "passes"), measures.last_value(run, "test_accuracy")
    return {
        "name": str(run.header.get("name") or run.folder.name),
        "arm": arm.name,
        "method": arm.method,
        "seed": run.seed,
        "status": measures.status(run),
        "samples": f"{run.evals[-1]['samples']:,}" if run.evals else "0",
        "passes": NONE if passes is None else f"{passes:g}",
        "last": NONE if last is None else percent(last),
        "hash": str(run.header.get("config_hash") or NONE),
    }


def charts(runs: list[Run], pictures: dict[str, Path], tell: Tell) -> list[dict[str, Any]]:
    """The figures, each with a view per axis."""
    found = []
    for number, chart in enumerate(drawn := figures.charts_with_values(runs), 1):
        tell("writing the page", number, len(drawn))
        views = [
            view(
                axis.name,
                pictures[chart.stem(axis)].read_bytes(),
                figures.interactive(runs, chart, axis),
            )
            for axis in figures.axes_of(runs, chart)
        ]
        caption = figures.caption(chart, runs)
        found.append({"name": chart.name, "title": chart.title, "caption": caption, "views": views})
    return found


def view(label: str, png: bytes, drawing: Any) -> dict[str, Any]:
    """What a figure shows at once: a picture as data URL, and what plotly draws in its place, None where there is nothing to draw."""
    drawn = None if drawing is None else json.loads(drawing.to_json())
    recorded = drawn is not None and any(trace.get("x") for trace in drawn["data"])
    return {"label": label, "png": "data:image/png;base64," + base64.b64encode(small_png(png)).decode(),
            "drawing": {"data": drawn["data"], "layout": drawn["layout"]} if drawn is not None and recorded else None}  # fmt: skip


def small_png(png: bytes) -> bytes:
    """The picture in few colours, a third of the bytes; a tall one, of many panels, in less detail too."""
    from PIL import Image

    out, picture = io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    if picture.height > TALL:
        scale = 2 / 3 if picture.height < 2 * TALL else 1 / 2
        size = round(scale * picture.width), round(scale * picture.height)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def blocks(
    of: list[Arm], columns: list[tuple[Measure, str]], second: float
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The table's rows by point of the grid: the point in words, and an entry for each of its arms."""
    groups = group_by_point(of)
    return [
        (where, without_dashes([row(arm, columns, second) for arm in group]))
        for where, group in zip(point_names(groups), groups, strict=True)
    ]


def without_dashes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with nothing in place of dashes where no row has a value, as for memorisation where no label is wrong."""
    cells = [row["cells"] for row in rows]
    empty = [
        all(column == (NONE, "") for column in columns) for columns in zip(*cells, strict=True)
    ]
    return [
        row
        | {
            "cells": [
                ("", "") if none else cell for cell, none in zip(row["cells"], empty, strict=True)
            ]
        }
        for row in rows
    ]


def row(arm: Arm, columns: list[tuple[Measure, str]], second: float) -> dict[str, Any]:
    cells = [spelled(st.spread_over_seeds(arm, measure), measure, second) for measure, _ in columns]
    return {"arm": arm, "name": with_star(arm.method, arm), "cells": cells}


def explanations(of: list[Arm]) -> list[tuple[str, str]]:
    """What each method does, (method, sentence); by arm where that differs between points of the grid."""
    told: dict[str, set[str]] = {}
    for arm in of:
        told.setdefault(arm.method, set()).add(described(arm))
    return list(
        dict.fromkeys(
            (arm.method if len(told[arm.method]) == 1 else arm.name, described(arm)) for arm in of
        )
    )


def averaged(of: list[Arm]) -> str:
    """What a cell of the results is, with the deviation only where there is one."""
    sizes = {
        found.n
        for arm in of
        for measure in measures.MEASURES
        if (found := st.spread_over_seeds(arm, measure))
    }
    if max(sizes, default=1) == 1:
        return "Of finished runs."
    return (
        "Mean over seeds ± sample standard deviation"
        + (" where n > 1" if min(sizes) == 1 else "")
        + ", of finished runs."
    )


def meanings(columns: list[tuple[Measure, str]]) -> list[tuple[str, str]]:
    """What the columns' names mean, (name, sentence)."""
    shown = [measure for measure, _ in columns if measure.name in MEANING]
    return [
        ("selected" if measure is measures.SELECTED else measure.label, MEANING[measure.name])
        for measure in shown
    ]


def titled(of: list[Arm], title: str | None) -> str:
    """The title given, else the arms."""
    names = list(dict.fromkeys(arm.method for arm in of))
    listed = (
        listing(names)
        if len(names) <= SHOWN
        else f"{(gaf_of(of) or of[0]).method} and {len(names) - 1} other arms"
    )
    return title or listed[:1].upper() + listed[1:]


def departures(
    of: list[Arm], differing: list[tuple[str, list[str]]]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each method, (name, value) of the conditions in which it departs from the baseline of its point; by arm where points differ."""
    bases = {id(arm): of.index(baseline_of(group)) for group in group_by_point(of) for arm in group}
    found = [
        [(name, values[i]) for name, values in differing if values[i] != values[bases[id(arm)]]]
        for i, arm in enumerate(of)
    ]
    told: dict[str, list[list[tuple[str, str]]]] = {}
    for arm, values in zip(of, found, strict=True):
        told.setdefault(arm.method, []).append(values)
    same = {method for method, each in told.items() if uniform(each)}
    named = [
        (arm.method if arm.method in same else arm.name, values)
        for arm, values in zip(of, found, strict=True)
    ]
    return list(dict(named).items())


def render(template: str, charts: list[dict[str, Any]], **values: Any) -> str:
    """A page, which has in it all that it needs, plotly and what it draws too, both compressed.

    charts: with "name", and "views" that have "drawing".
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed}
    drawings = {chart["name"]: [view["drawing"] for view in chart["views"]] for chart in charts}
    return environment.get_template(template).render(
        plotly=plotly(),
        drawings=compress(json.dumps(drawings)),
        charts=charts,
        crowd=CROWD,
        **values,
    )


@functools.cache
def plotly() -> str:
    from plotly.offline import get_plotlyjs

    return compress(get_plotlyjs())


def compress(text: str) -> str:
    """gzip in base64, which the page unpacks; the same text gives the same bytes."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def write(runs: list[Run], out: Path, title: str | None = None, tell: Tell = silent) -> Path:
    """Writes the figures as PNG, the table as `report.csv` and `report.tex`, and `report.html`, into the folder `out`.

    The page needs no other file. The same runs give the same bytes.

    Args:
        runs: at least one.
        out: made where it is missing.
        title: the page's heading; without it, the arms.
        tell: called with what is being made, its number, and how many there are.

    Returns:
        The path of report.html.

    Raises:
        ValueError: without runs.
    """
    of = arms_of(runs)
    columns, second = headings(of)
    common, differing = conditions(of)
    methods = list(dict.fromkeys(arm.method for arm in of))
    arms = {id(run): arm for arm in of for run in arm.runs}
    first, rest = opening(of)
    blocked = blocks(of, columns, second)
    page = render(
        "report.html.j2",
        title=titled(of, title),
        summary=first,
        findings=rest,
        columns=[heading for _, heading in columns],
        blocks=blocked,
        files=sheets.write(*sheet(columns, blocked), out / "report"),
        averaged=averaged(of),
        meanings=meanings(columns),
        starred=any(not arm.finished_runs for arm in of),
        compared=compared(of),
        charts=charts(runs, figures.write(runs, out, tell), tell),
        palette=figures.palette(methods),
        explained=explanations(of),
        arms=of,
        common=common,
        differing=differing,
        departures=departures(of, differing),
        runs=[listed(run, arms[id(run)]) for run in runs],
        commands=commands(runs),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def sheet(
    columns: list[tuple[Measure, str]], blocked: list[tuple[str, list[dict[str, Any]]]]
) -> tuple[list[str], list[list[sheets.Cell]]]:
    """The table of results for other programs: headings, and rows of text, whole numbers, and (mean, deviation)."""
    places = [[where] if len(blocked) > 1 else [] for where, _ in blocked]
    heads = [*(["point"] if len(blocked) > 1 else []), "arm", "seeds", *(h for _, h in columns)]
    return heads, [
        [*place, row["name"], len(row["arm"].seeds), *row["cells"]]
        for place, (_, rows) in zip(places, blocked, strict=True)
        for row in rows
    ]
