"""The columns of a report's table of results, in the terminal and on the page."""

from dataclasses import dataclass

from gaf_lab.report.arms import Arm, score_of
from gaf_lab.report.charts import clock
from gaf_lab.report.measures import SECONDS, Measure, shown_measures
from gaf_lab.report.statistics import spread_over_seeds
from gaf_lab.report.text import spread_as_text


@dataclass(frozen=True)
class Column:
    """A measure, its unit as text, and for times the length of that unit in seconds."""

    measure: Measure
    unit: str
    second: float

    @property
    def heading(self) -> str:
        return f"{self.measure.label} ({self.unit})" if self.unit else self.measure.label

    def cell(self, arm: Arm) -> tuple[str, str]:
        """Mean and deviation of the arm as text."""
        return spread_as_text(spread_over_seeds(arm, self.measure), self.measure, self.second)

    def has_value(self, arms: list[Arm]) -> bool:
        return any(spread_over_seeds(arm, self.measure) for arm in arms)


def result_columns(arms: list[Arm]) -> list[Column]:
    """A column for each measure that some arm has."""
    times = [spread.mean for arm in arms if (spread := spread_over_seeds(arm, SECONDS))]
    unit, second = clock(max(times, default=0.0))
    units = {"share": "%", "seconds": unit, "number": "", "distance": ""}
    columns = [
        Column(measure, units[measure.unit], second) for measure in shown_measures(score_of(arms))
    ]
    return [column for column in columns if column.has_value(arms)]
