"""What the runs have to show in a chart: its panels at each point of the grid, and their values."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, group_by_arm, group_by_point, is_gaf, point_names
from gaf_lab.report.charts import CHARTS, SAMPLES, Axis, Chart, Panel, score_chart
from gaf_lab.report.measures import selected_evaluation
from gaf_lab.report.palette import CROWD
from gaf_lab.report.statistics import Curve, Values, values_along


@dataclass(frozen=True)
class Cell:
    """One pair of axes of a figure: a panel at a point of the grid.

    Attributes:
        where: the point in words; empty if there is one only.
        arms: those of the point, named by their methods.
    """

    panel: Panel
    where: str
    arms: list[Arm]

    @property
    def title(self) -> str:
        return f"{self.panel.label}, {self.where}" if self.where else self.panel.label


def cells_of(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> list[Cell]:
    """The panels of a chart that some run has values for, at every point of the grid."""
    groups = group_by_point(group_by_arm(runs))
    places = [
        (where, [dataclasses.replace(arm, name=arm.method) for arm in group])
        for where, group in zip(point_names(groups), groups, strict=True)
    ]
    return [
        Cell(panel, where, group)
        for panel in chart.panels
        for where, group in places
        if has_values(group, panel, axis)
    ]


def has_values(arms: list[Arm], panel: Panel, axis: Axis = SAMPLES) -> bool:
    runs = [run for arm in arms for run in arm.runs]
    return any(values_along(run, panel.key, axis.key)[0].size for run in runs)


def charts_with_values(runs: list[Run]) -> list[Chart]:
    """The charts that these runs have values for."""
    scores = [score_chart(score) for score in dict.fromkeys(run.score for run in runs)]
    return [chart for chart in (*scores, *CHARTS[1:]) if cells_of(runs, chart)]


def names_in(found: Sequence[Cell]) -> list[str]:
    """The methods of some cells, each once."""
    return list(dict.fromkeys(arm.name for cell in found for arm in cell.arms))


def axes_with_values(runs: list[Run], chart: Chart) -> list[Axis]:
    """The axes of the chart along which the runs have values."""
    return [axis for axis in chart.axes if cells_of(runs, chart, axis)]


def thresholds(of: list[Arm]) -> dict[float, list[str]]:
    """The taus of the arms of GAF, and which arms have each; without tau = 2, which accepts all."""
    found: dict[float, list[str]] = {}
    for arm in of:
        tau = arm.config.get("tau")
        if is_gaf(arm) and tau is not None and tau < 2:
            found.setdefault(float(tau), []).append(arm.name)
    return found


def taus_of(chart: Chart, cell: Cell) -> list[float]:
    """The thresholds to draw; none unless the cell's distances are those compared with them."""
    if not chart.thresholds or cell.panel.key != "distance_mean":
        return []
    return list(thresholds(cell.arms))


def selected_point(run: Run, panel: Panel, axis: Axis) -> tuple[float, float] | None:
    """The evaluation that held-out labels select, in the units of axis and panel."""
    line = selected_evaluation(run)
    if line is None or line.get(panel.key) is None or line.get(axis.key) is None:
        return None
    return line[axis.key] / axis.unit, line[panel.key] * panel.factor


def single_runs(arm: Arm, of: list[Arm], mean: Curve | None) -> list[Run]:
    """The runs to draw one by one; of more than CROWD arms, only those of arms without a mean."""
    return arm.runs if mean is None or len(of) <= CROWD else []


def track(run: Run, panel: Panel, axis: Axis) -> tuple[Values, Values]:
    """The run's positions on the axis (p,), and the panel's values there (p,)."""
    x, y = values_along(run, panel.key, axis.key)
    return x / axis.unit, y * panel.factor
