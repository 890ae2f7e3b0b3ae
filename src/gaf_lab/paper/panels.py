"""What the figures show: panels, their measures, and the chart of a figure over training."""

import dataclasses
from collections.abc import Callable

from gaf_lab.paper.items import Item
from gaf_lab.paper.places import arms_by_position
from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.cells import has_values
from gaf_lab.report.charts import CHARTS, SAMPLES, STEPS, TIME, Axis, Chart, Panel
from gaf_lab.report.measures import Measure

PANELS = {panel.key: panel for chart in CHARTS for panel in chart.panels}
PANELS["clean_accuracy"] = Panel(
    "clean_accuracy", "accuracy on correctly labelled training samples (%)", 100.0, "%", 1
)


def distance_measure(name: str, label: str, value: Callable[[Run, str], float | None]) -> Measure:
    return Measure(name, label, "distance", lambda run: value(run, "distance_mean"))


DISTANCES = (
    distance_measure("distance", "cosine distance, mean over the run", measures.mean_over_run),
    distance_measure("lowest", "cosine distance, lowest evaluation", measures.lowest_value),
    distance_measure("distance_last", "cosine distance, last", measures.last_value),
)
CLEAN = measures.last_of("clean_accuracy", "accuracy on correctly labelled training samples")
PANEL_MEASURES = {
    "test_accuracy": (measures.LAST, measures.SELECTED),
    "distance_mean": DISTANCES,
    "memorised": (measures.MEMORISED,),
    "corrected": (measures.CORRECTED,),
    "clean_accuracy": (CLEAN,),
}
ACROSS = {
    "noise_rate": "training labels flipped (%)",
    "tau": "τ, the largest cosine distance that is accepted",
    "b": "micro-batch size b",
}


def measure_title(key: str, measure: Measure) -> str:
    unit = PANELS[key].unit
    return f"{measure.label} ({unit})" if unit else measure.label


def chart_of(item: Item) -> Chart:
    """The item as a chart. Accuracy over training is drawn against samples, steps and time."""
    axes: tuple[Axis, ...] = (SAMPLES,)
    if item.kind == "curves" and "test_accuracy" in item.keys:
        axes = (SAMPLES, STEPS, TIME)
    return Chart(item.id, item.title, tuple(PANELS[key] for key in item.keys), "", axes=axes)


def fit_chart(chart: Chart, panel: Panel) -> Chart:
    """The chart with the marks of this panel: circles for accuracy, thresholds for distances."""
    shares = panel.key in ("memorised", "corrected", "clean_accuracy")
    return dataclasses.replace(
        chart,
        marks=panel.key == "test_accuracy",
        thresholds=panel.key == "distance_mean",
        zero=shares,
    )


def panels_with_values(item: Item, runs: list[Run]) -> list[Panel]:
    """The panels of a figure over training that some run has values for."""
    groups = arms_by_position(item, runs).values()
    panels = chart_of(item).panels
    return [panel for panel in panels if any(has_values(arms, panel) for arms in groups)]


def measures_with_values(item: Item, runs: list[Run]) -> list[tuple[str, Measure]]:
    """The panels of a figure against a field, from above; those without a value are left out.

    Accuracy has two, last and selected; distances have two, mean and last.
    """
    arms = [arm for of in arms_by_position(item, runs).values() for arm in of]
    return [
        (key, measure)
        for key in item.keys
        for measure in PANEL_MEASURES[key]
        if measure.name != "lowest" and any(st.spread_over_seeds(arm, measure) for arm in arms)
    ]
