"""The table of results for the terminal, and the differences beneath it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, group_by_arm, group_by_point, point_names, score_of
from gaf_lab.report.columns import Column, result_columns
from gaf_lab.report.findings import certainty, last_measure, overall_tally
from gaf_lab.report.measures import SECONDS, score_measures
from gaf_lab.report.pairs import differences_of
from gaf_lab.report.palette import CROWD
from gaf_lab.report.sentences import ONE_SEED
from gaf_lab.report.statistics import spread_over_seeds
from gaf_lab.report.text import MINUS, difference_as_text, with_star

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

WIDTH = 79  # columns of a terminal that the table fits into
GAP = 2  # spaces between two columns of the table; one after the last
SHORT = {
    "selected": "selected",
    "last": "last",
    "memorised": "memorised",
    "acceptance": "accepted",
    "steps_taken": "steps",
    "seconds": "time",
}
Cells = list[str]  # of a row: name, n, and a cell for each column


@dataclass(frozen=True)
class ResultsTable:
    """A rich renderable. Points of a grid stand on lines of their own, as wide as the table."""

    heads: Cells
    points: list[tuple[str, list[Cells]]]
    notes: list[str]

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        from rich.constrain import Constrain
        from rich.text import Text

        widths = self.widths(options.max_width)
        yield grid(self.heads, [], widths)
        for where, rows in self.points:
            if where:
                yield Text(where, style="bold")
            yield grid(None, rows, widths)
        wide = max(sum(widths) + GAP * len(widths) - 1, min(WIDTH, max(map(len, self.notes))))
        yield Constrain(Text("\n".join(self.notes), style="dim"), wide)

    def widths(self, most: int) -> list[int]:
        """Of the columns. Long names fold so that the table fits into `most`."""
        rows = [self.heads, *(row for _, rows in self.points for row in rows)]
        names, *numbers = [max(map(len, column)) for column in zip(*rows, strict=True)]
        room = most - sum(numbers) - GAP * len(numbers) - 1
        return [max(min(names, room), 6), *numbers]


def results_table(runs: list[Run]) -> ResultsTable:
    """A row per arm: mean ± sample standard deviation over seeds; paired differences beneath.

    Raises:
        ValueError: without runs.
    """
    arms = arms_or_error(runs)
    columns = [column for column in result_columns(arms) if column.measure.name in SHORT]
    groups = group_by_point(arms)
    points = []
    for where, group in zip(point_names(groups), groups, strict=True):
        points.append((where, rows_at(group, columns)))
    return ResultsTable(["arm", "n", *map(head, columns)], points, notes_on(arms))


def arms_or_error(runs: list[Run]) -> list[Arm]:
    if not runs:
        raise ValueError(
            "report: must have at least one run; got none. "
            "Give the folder that `gaf train --out` wrote."
        )
    return group_by_arm(runs)


def head(column: Column) -> str:
    name = SHORT[column.measure.name]
    return f"{name} ({column.unit})" if column.measure is SECONDS else name


def rows_at(arms: list[Arm], columns: list[Column]) -> list[Cells]:
    """The rows of a point. Columns in which no arm has a value are left empty."""
    filled = [column.has_value(arms) for column in columns]
    rows = []
    for arm in arms:
        cells = [
            cell(arm, column) if has else "" for column, has in zip(columns, filled, strict=True)
        ]
        rows.append([with_star(arm.method, arm), str(len(arm.seeds)), *cells])
    return rows


def cell(arm: Arm, column: Column) -> str:
    """The mean; for scores with the deviation."""
    mean, deviation = column.cell(arm)
    return f"{mean} {deviation}".strip() if column.measure.name in ("selected", "last") else mean


def grid(heads: Cells | None, rows: list[Cells], widths: list[int]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        show_header=heads is not None,
        header_style="bold",
    )
    first, *others = heads or [""] * len(widths)
    table.add_column(first, width=widths[0], overflow="fold")
    for text, width in zip(others, widths[1:], strict=True):
        table.add_column(text, width=width, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    return table


def notes_on(arms: list[Arm]) -> list[str]:
    """How to read the table, and the differences at the last evaluation."""
    score = score_of(arms)
    unit = "in %, means" if score.share else "means"
    lines = [f"{unit} over n seeds; selected, last: test {score.name}" + deviation_note(arms)]
    if not all(arm.finished_runs for arm in arms):
        lines.append("* unfinished runs only, as far as they got")
    gaps = differences_of(arms, last_measure(arms))
    if len(gaps) > 2 * CROWD:
        return [*lines, *overall_tally(arms), "The page shows every difference."]
    for gap in gaps:
        points = difference_as_text(gap.mean, gap.measure)
        lines.append(f"{gap.arm} {MINUS} {gap.other}, last: {points} {certainty(gap)}")
    return [*lines, ONE_SEED] if any(gap.n == 1 for gap in gaps) else lines


def deviation_note(arms: list[Arm]) -> str:
    measures = score_measures(score_of(arms))
    spreads = [spread_over_seeds(arm, measure) for arm in arms for measure in measures]
    several = any(spread is not None and spread.n > 1 for spread in spreads)
    return " ± standard deviation" if several else ""
