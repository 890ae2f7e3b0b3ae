"""Arms: which runs are of one arm, how arms are named, and which arms stand at one point.

Runs of one arm differ by their seed alone: they share a name, and every config field that has an
effect on them. A report's points form a grid, such as the noise rates of a sweep; only arms of
one point are compared.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gaf_lab.records.run import Run
from gaf_lab.records.score import Score
from gaf_lab.report.fields import (
    Settings,
    differing_fields,
    has_label,
    in_words,
    point_fields,
    settings_of,
)
from gaf_lab.report.measures import status

BASELINE = "averaging"  # the arm that the others are compared with, if there is one of this name


@dataclass(frozen=True)
class Arm:
    """The runs of one arm, in the order given. `group_by_arm` makes it.

    Attributes:
        name: the runs' own; where other arms of the report have the same, it is followed by what
            differs: "GAF, tau 0.5, noise rate 0.4".
        settings: those of the runs.
        point: the fields of the report's grid, and the arm's values.
        differing: the fields in which arms of this name differ.
    """

    name: str
    runs: list[Run]
    settings: Settings = dataclasses.field(default_factory=dict)
    point: Settings = dataclasses.field(default_factory=dict)
    differing: list[str] = dataclasses.field(default_factory=list)

    @property
    def method(self) -> str:
        """The name without the point: "GAF, tau 0.5"."""
        fields = [field for field in self.differing if field not in self.point]
        return ", ".join([self.kind, *in_words(self.settings, fields)])

    @property
    def kind(self) -> str:
        """The name that the runs have themselves: "GAF"."""
        return self.runs[0].arm

    @property
    def config(self) -> dict[str, Any]:
        """The first run's."""
        config: dict[str, Any] = self.runs[0].header["config"]
        return config

    @property
    def finished_runs(self) -> list[Run]:
        return [run for run in self.runs if status(run) == "finished" and run.evals]

    @property
    def counted_runs(self) -> list[Run]:
        """The runs behind means and curves: the finished ones, else all with evaluations."""
        return self.finished_runs or [run for run in self.runs if run.evals]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.counted_runs})


def group_by_arm(runs: Iterable[Run]) -> list[Arm]:
    """The arms of some runs: point by point, and at each point the baseline first.

    Points and the other arms come in the order of their first runs.

    A point consists of DATA_FIELDS, of the SIZE_FIELDS that differ among runs without a label (a
    label, such as "larger batch", names a deliberate difference), and of the other fields that
    differ under one name. METHOD_FIELDS are no part of it: GAF at every tau is compared with
    averaging on the same data.
    """
    given = list(runs)
    by_folder = {run.folder: run for run in given}
    groups: list[tuple[str, Settings, list[Run]]] = []
    for run in given:
        settings = settings_of(run, by_folder)
        for name, others, group in groups:
            if (name, others) == (run.arm, settings):
                group.append(run)
                break
        else:
            groups.append((run.arm, settings, [run]))
    differing = {
        name: differing_fields([settings for other, settings, _ in groups if other == name])
        for name, _, _ in groups
    }
    unlabelled = [settings for _, settings, group in groups if not has_label(group)]
    grid = point_fields(differing.values(), unlabelled)
    arms = []
    for name, settings, group in groups:
        full_name = ", ".join([name, *in_words(settings, differing[name])])
        point = {field: settings.get(field) for field in grid}
        arms.append(Arm(full_name, group, settings, point, differing[name]))
    return [arm for at_point in group_by_point(arms) for arm in baseline_first(at_point)]


def score_of(arms: Sequence[Arm]) -> Score:
    """What the runs are judged by.

    Raises:
        ValueError: if they are judged by different scores, which have no common scale.
    """
    scores = list(dict.fromkeys(run.score for arm in arms for run in arm.runs))
    if len(scores) > 1:
        names = " and ".join(score.name for score in scores)
        raise ValueError(
            f"report: the runs must be judged by one score; these are by {names}. "
            "Report each task by itself."
        )
    return scores[0]


def group_by_point(arms: Iterable[Arm]) -> list[list[Arm]]:
    """The arms by their point of the grid, in order of first appearance."""
    groups: list[list[Arm]] = []
    for arm in arms:
        for group in groups:
            if group[0].point == arm.point:
                group.append(arm)
                break
        else:
            groups.append([arm])
    return groups


def point_names(groups: Sequence[list[Arm]]) -> list[str]:
    """The points of a grid in words: "noise rate 0.4"; empty if there is one point only."""
    fields = differing_fields([group[0].point for group in groups])
    return [", ".join(in_words(group[0].point, fields)) for group in groups]


def baseline_of(arms: list[Arm]) -> Arm:
    """The arm "averaging"; without one of that name, the first."""
    return next((arm for arm in arms if arm.kind == BASELINE), arms[0])


def baseline_first(arms: list[Arm]) -> list[Arm]:
    return sorted(arms, key=lambda arm: arm.kind != BASELINE)


def is_gaf(arm: Arm) -> bool:
    """Whether the arm filters by GAF's rule; without a recorded policy, by its name."""
    policy = arm.config.get("policy")
    return policy == "gaf" or (policy is None and arm.name.lower().startswith("gaf"))


def gaf_of(arms: list[Arm]) -> Arm | None:
    """The arm "GAF"; without one of that name, the first that filters by GAF's rule."""
    named = (arm for arm in arms if arm.kind == "GAF")
    return next(named, next(filter(is_gaf, arms), None))
