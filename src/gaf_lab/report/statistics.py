"""The numbers of a report: means over seeds, paired differences between arms, curves. Each is a function of the runs alone.

Runs of one arm differ by their seed: they share a name, and all of their configs that means something to them. Only
finished runs are compared; an arm that has none is described by the runs that it has, as far as they got, and takes part
in no difference. Runs that share arm and seed are averaged first, so n always counts seeds. Missing values (null in the
records) are left out, never replaced.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gaf_lab.records.run import Run
from gaf_lab.settings.config import LATER, TrainConfig

Values = NDArray[np.float64]

# of an evaluation: mean cosine distance of two micro-gradients, whatever the arm does with them
PAIRS = "distance_pairs"
BASELINE = "averaging"  # the arm that the others are compared with, where there is one of this name
ENOUGH = 3  # seeds: with fewer, no difference is claimed
LEVEL = 0.95
RESAMPLES = 10_000

FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))
# these name a run; what a control replays differs from seed to seed
RUN = ("seed", "label", "replay")
FILTER = (
    "tau",
    "threshold",
    "threshold_by",
    "half_life",
    "start",
    "average",
    "min_accepted",
    "scope",
)
TECHNIQUE = (
    "loss",
    "label_smoothing",
    "gce_q",
    "elr_beta",
    "elr_lambda",
    "mixup",
    "sam",
    "ema",
    "early_stopping",
)
METHOD = (*FILTER, *TECHNIQUE, "policy", "step_probability")
DATA = ("dataset", "noise", "noise_rate", "limit")
SIZES = ("heldout", "sampler", "augment", "size", "model", "stem", "k", "b", "passes")

Settings = dict[str, Any]  # of a config, by field, what means something to the run


@dataclass(frozen=True)
class Measure:
    """A number per run. unit: "share" in [0, 1], "distance" in [0, 2], or "seconds". value: None where the run does not have it."""

    name: str
    label: str
    unit: Literal["share", "distance", "seconds"]
    value: Callable[[Run], float | None]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over n seeds; the deviation is None for n = 1."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None without values."""
        array = np.array(list(values), dtype=np.float64)
        if not array.size:
            return None
        return cls(
            float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size
        )


@dataclass(frozen=True)
class Arm:
    """The runs of one arm, in the order given.

    Attributes:
        name: the runs' own, with what sets them apart where others in the report share it: "GAF, tau 0.5, noise rate 0.4".
        settings: the runs' own.
        point: where in the report's grid the arm stands; only arms of one point are compared. See `arms`.
        varied: the fields in which arms of this name differ.
    """

    name: str
    runs: list[Run]
    settings: Settings = dataclasses.field(default_factory=dict)
    point: Settings = dataclasses.field(default_factory=dict)
    varied: list[str] = dataclasses.field(default_factory=list)

    @property
    def method(self) -> str:
        """The name without what its point of the grid says: "GAF, tau 0.5"."""
        fields = [field for field in self.varied if field not in self.point]
        return ", ".join([self.kind, *told_apart(self.settings, fields)])

    @property
    def kind(self) -> str:
        """The name without what sets it apart from others that share it."""
        return self.runs[0].arm

    @property
    def config(self) -> dict[str, Any]:
        """The first run's."""
        config: dict[str, Any] = self.runs[0].header["config"]
        return config

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if status(run) == "finished" and run.evals]

    @property
    def counted(self) -> list[Run]:
        """The runs behind the arm's means and curves: the finished ones, or, without any, all that were evaluated."""
        return self.finished or [run for run in self.runs if run.evals]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.counted})


@dataclass(frozen=True)
class Difference:
    """arm - other in one measure, over the n seeds that both finished.

    Attributes:
        mean: in the measure's unit, so in [-1, 1] for a share.
        low, high: paired bootstrap interval of the mean, at 95%; None for n = 1.
    """

    arm: str
    other: str
    measure: Measure
    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def told(self) -> bool:
        """Whether a difference can be told: three seeds or more, and an interval without 0."""
        return (
            self.low is not None
            and self.high is not None
            and self.n >= ENOUGH
            and (self.low > 0 or self.high < 0)
        )


@dataclass(frozen=True)
class Curve:
    """A key of the evaluations over samples, steps or seconds, all (p,): the mean over n runs, their lowest and highest value."""

    x: Values
    mean: Values
    low: Values
    high: Values
    n: int


def status(run: Run) -> str:
    """The end line's word; "unfinished" without one: the run still goes on, or was killed."""
    return str(run.end["status"]) if run.end else "unfinished"


def value_in(run: Run, line: dict[str, Any], key: str) -> float | None:
    """What a line of the run's evaluations has under the key, None without a value."""
    value = pair_distance(run, line) if key == PAIRS and PAIRS not in line else line.get(key)
    return None if value is None else float(value)


def pair_distance(run: Run, line: dict[str, Any]) -> float | None:
    """Mean cosine distance of two micro-gradients, B / (b + B), from the noise scale B of a line without a distance of its own.

    A noise scale that was infinite is null in the records: no signal was made out, and the distance is 1 or more; it is given as 1.
    """
    if line.get("distance_mean") is None:  # nothing was compared
        return None
    noise, b = line.get("noise_scale"), run.header["config"].get("b")
    if "noise_scale" not in line or b is None:
        return None
    return 1.0 if noise is None else noise / (b + noise)


def last(run: Run, key: str) -> float | None:
    """The value at the last evaluation that holds one."""
    values = (value_in(run, line, key) for line in reversed(run.evals))
    return next((value for value in values if value is not None), None)


def selected(run: Run) -> dict[str, Any] | None:
    """The evaluation that noisy held-out labels select; None where the run held nothing out, for then nothing selects."""
    return (
        run.selected
        if any(line.get("heldout_accuracy") is not None for line in run.evals)
        else None
    )


def selected_accuracy(run: Run) -> float | None:
    line = selected(run)
    return (
        None if line is None or line.get("test_accuracy") is None else float(line["test_accuracy"])
    )


def throughout(run: Run, key: str) -> float | None:
    """Mean over the run of what each line says of the steps since the line before: it weighs as many."""
    steps = [0, *(line["step"] for line in run.evals)]
    parts = [
        (value_in(run, line, key), after - before)
        for line, before, after in zip(run.evals, steps, steps[1:], strict=False)
    ]
    held = [(value, weight) for value, weight in parts if value is not None and weight > 0]
    total = sum(weight for _, weight in held)
    return sum(value * weight for value, weight in held) / total if total else None


def lowest(run: Run, key: str) -> float | None:
    values = (value_in(run, line, key) for line in run.evals)
    return min((value for value in values if value is not None), default=None)


def steps_taken(run: Run) -> float | None:
    """Steps taken over steps tried."""
    return (
        run.evals[-1]["steps_taken"] / run.evals[-1]["step"]
        if run.evals and run.evals[-1]["step"]
        else None
    )


def seconds(run: Run) -> float | None:
    recorded = run.end.get("seconds") if run.end else None
    return last(run, "seconds") if recorded is None else float(recorded)


SELECTED = Measure("selected", "test accuracy, selected on held-out", "share", selected_accuracy)
LAST = Measure("last", "test accuracy, last", "share", lambda run: last(run, "test_accuracy"))
MEMORISED = Measure("memorised", "memorised", "share", lambda run: last(run, "memorised"))
CORRECTED = Measure("corrected", "corrected", "share", lambda run: last(run, "corrected"))
ACCEPTANCE = Measure("acceptance", "accepted", "share", lambda run: throughout(run, "acceptance"))
STEPS = Measure("steps_taken", "steps taken", "share", steps_taken)
SECONDS = Measure("seconds", "time", "seconds", seconds)

MEASURES = (SELECTED, LAST, MEMORISED, CORRECTED, ACCEPTANCE, STEPS, SECONDS)
COMPARED = (LAST, SELECTED, MEMORISED, CORRECTED)  # those that differences are taken of


def arms(runs: Iterable[Run]) -> list[Arm]:
    """The runs grouped by arm, in order of first appearance.

    An arm's runs share name and settings. Where arms share a name, it is followed by what differs between them.

    Arms stand at one point of the grid where they agree in their data, in those of SIZES that differ among runs without a
    label (a label, such as "larger batch", says what it departs in), and in what else differs under one name. The method
    itself is no part of it: GAF at every tau is compared with the averaging of the same data.
    """
    given = list(runs)
    beside = {run.folder: run for run in given}
    groups: list[tuple[str, Settings, list[Run]]] = []
    for run in given:
        found = settings(run, beside)
        group = next(
            (group for name, values, group in groups if (name, values) == (run.arm, found)), None
        )
        if group is None:
            groups.append((run.arm, found, [run]))
        else:
            group.append(run)
    within = {
        name: varied([values for other, values, _ in groups if other == name])
        for name, _, _ in groups
    }
    grid = pointing(within.values(), [values for _, values, group in groups if not labelled(group)])
    return [
        Arm(
            ", ".join([name, *told_apart(values, within[name])]),
            group,
            values,
            {field: values.get(field) for field in grid},
            within[name],
        )
        for name, values, group in groups
    ]


def settings(run: Run, beside: dict[Path, Run]) -> Settings:
    """What the run is, but for RUN. A control is told by the filter of the run that it replays, where that is among those given.

    beside: runs by their folders.
    """
    config = LATER | run.header["config"]
    replayed = (
        beside.get(run.folder.parent / Path(config["replay"]).name)
        if config.get("replay")
        else None
    )
    if replayed is not None:
        config |= {
            field: value
            for field, value in (LATER | replayed.header["config"]).items()
            if field in FILTER
        }
    known = [field for field in dict.fromkeys([*FIELDS, *config]) if field in config]
    return {field: config[field] for field in known if field not in RUN and matters(field, config)}


def matters(field: str, config: Settings) -> bool:
    """Whether a field means something to a run: averaging has no tau, clean labels no rate."""
    policy, replays = config.get("policy"), bool(config.get("replay"))
    if field in FILTER:
        return policy != "mean" and (policy != "random-skip" or replays)
    if field == "step_probability":
        return policy == "random-skip" and not replays
    return field != "noise_rate" or config.get("noise") not in ("none", "human")


def labelled(runs: list[Run]) -> bool:
    return any(run.header["config"].get("label") for run in runs)


def varied(of: Sequence[Settings]) -> list[str]:
    """The fields that are not the same in all, in the config's order."""
    fields = dict.fromkeys(field for values in of for field in values)
    differing = [
        field for field in fields if any(values.get(field) != of[0].get(field) for values in of)
    ]
    return sorted(
        differing, key=lambda field: FIELDS.index(field) if field in FIELDS else len(FIELDS)
    )


def pointing(within: Iterable[list[str]], unlabelled: Sequence[Settings]) -> list[str]:
    """The fields that make up a point of the grid; see `arms`."""
    found = [
        *DATA,
        *(field for field in varied(unlabelled) if field in SIZES),
        *(field for fields in within for field in fields),
    ]
    return [field for field in dict.fromkeys(found) if field not in METHOD]


def told_apart(values: Settings, fields: Sequence[str]) -> list[str]:
    """The fields in the words of the command line: "tau 0.5", "noise rate 0.6", "no augment"; without those that the arm has no use for."""
    return [
        worded(field.replace("_", " "), values[field])
        for field in fields
        if values.get(field) is not None
    ]


def worded(words: str, value: Any) -> str:
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, list | tuple):
        return " ".join([words, *(f"{one:g}" for one in value)])
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def by_point(of: Iterable[Arm]) -> list[list[Arm]]:
    """The arms by their point of the grid, in order of first appearance."""
    found: list[list[Arm]] = []
    for arm in of:
        group = next((group for group in found if group[0].point == arm.point), None)
        if group is None:
            found.append([arm])
        else:
            group.append(arm)
    return found


def point_names(groups: Sequence[list[Arm]]) -> list[str]:
    """What sets each point of a grid apart, in words: "noise rate 0.4"; nothing where there is one point."""
    fields = varied([group[0].point for group in groups])
    return [", ".join(told_apart(group[0].point, fields)) for group in groups]


def baseline(of: list[Arm]) -> Arm:
    """The arm "averaging"; the first one where there is none of that name."""
    return next((arm for arm in of if arm.kind == BASELINE), of[0])


def by_seed(runs: Iterable[Run], measure: Measure) -> dict[int, float]:
    """The measure per seed, where it exists; the mean of runs that share a seed."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value = measure.value(run)
        if value is not None:
            values.setdefault(run.seed, []).append(value)
    return {seed: float(np.mean(group)) for seed, group in values.items()}


def spread(arm: Arm, measure: Measure) -> Spread | None:
    """Mean and spread over the arm's seeds; None where no run has a value."""
    return Spread.of(by_seed(arm.counted, measure).values())


def difference(arm: Arm, other: Arm, measure: Measure) -> Difference | None:
    """arm - other, paired by seed; None where no seed finished in both."""
    mine, theirs = by_seed(arm.finished, measure), by_seed(other.finished, measure)
    pairs = np.array(
        [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())],
        dtype=np.float64,
    )
    if not pairs.size:
        return None
    low, high = bootstrap(pairs) if pairs.size > 1 else (None, None)
    return Difference(arm.name, other.name, measure, float(pairs.mean()), low, high, pairs.size)


def differences(of: list[Arm], measure: Measure, against: Arm | None = None) -> list[Difference]:
    """Each arm against one, its point's baseline unless told otherwise; arms without a common seed or point are left out."""
    found = []
    for group in by_point(of):
        other = against or baseline(group)
        found += [
            difference(arm, other, measure)
            for arm in group
            if arm.name != other.name and arm.point == other.point
        ]
    return [one for one in found if one is not None]


def bootstrap(values: Values, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (n,), n >= 1, from means of n draws with replacement.

    With n = 2 or 3 this is the range of the values itself: one resample in n^n is the lowest value throughout, which is
    more than the 2.5% that is cut off. It is too narrow for few seeds; the page says so.
    """
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def points(run: Run, key: str, x: str = "samples") -> tuple[Values, Values]:
    """Another key (p,), strictly rising, and the key's values there (p,); evaluations without a value are left out.

    Of evaluations at the same x, as when no step was taken between them, the last counts.
    """
    found = {
        float(line[x]): value
        for line in run.evals
        if (value := value_in(run, line, key)) is not None and line.get(x) is not None
    }
    places = sorted(found)
    return np.array(places, dtype=np.float64), np.array(
        [found[place] for place in places], dtype=np.float64
    )


def curve(arm: Arm, key: str, x: str = "samples") -> Curve | None:
    """The key over samples seen, or over "steps_taken" or "seconds", over the arm's counted runs, where all of them have values.

    The x axis is the union of the runs' evaluation points, each run interpolated linearly between its own, and none
    beyond its ends; None where the runs share no range, or none has the key. Runs that early stopping ended keep their last value
    to the end of the longest: it is that of the weights that were put back.
    """
    tracks = [track for track in (points(run, key, x) for run in arm.counted) if track[0].size]
    if not tracks:
        return None
    stopped = all(run.end and run.header["config"].get("early_stopping") for run in arm.counted)
    last = max if stopped else min
    start, stop = max(across[0] for across, _ in tracks), last(across[-1] for across, _ in tracks)
    grid = np.unique(np.concatenate([across for across, _ in tracks]))
    grid = grid[(grid >= start) & (grid <= stop)]
    if not grid.size:
        return None
    values = np.stack([np.interp(grid, across, up) for across, up in tracks])
    return Curve(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(tracks))
