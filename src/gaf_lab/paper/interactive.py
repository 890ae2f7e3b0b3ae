"""The paper's figures for the page, drawn with plotly."""

from collections.abc import Sequence
from typing import Any

from gaf_lab.paper.curves import paper_end
from gaf_lab.paper.figures import has_anything
from gaf_lab.paper.items import Item
from gaf_lab.paper.panels import (
    ACROSS,
    PANELS,
    chart_of,
    fit_chart,
    measure_title,
    measures_with_values,
)
from gaf_lab.paper.places import (
    Position,
    arm_names,
    arms_by_position,
    axis_positions,
    tick_texts,
)
from gaf_lab.paper.series import Series, all_series
from gaf_lab.records.run import Run
from gaf_lab.report.arms import is_gaf
from gaf_lab.report.cells import has_values, thresholds
from gaf_lab.report.charts import SAMPLES, Axis, Panel, fit_axis
from gaf_lab.report.interactive import add_tau_line, arm_traces, stack_panels, trace_base
from gaf_lab.report.palette import Shade, palette


def plotly_item(item: Item, runs: list[Run], axis: Axis = SAMPLES) -> Any:
    """The same as a `plotly.graph_objects.Figure`; None for tables and the plane, and without runs.

    Traces have `meta` as in `gaf_lab.report.interactive.plotly_chart`, and in it "paper": whether
    they are the paper's values.
    """
    if item.kind in ("table", "plane") or not has_anything(item, runs):
        return None
    if item.kind == "curves":
        return plotly_curves(item, runs, fit_axis(axis, runs))
    return plotly_against(item, runs)


def plotly_curves(item: Item, runs: list[Run], axis: Axis) -> Any:
    """A row for each panel of each network and data set."""
    groups, chart = arms_by_position(item, runs), chart_of(item)
    colours = palette(arm_names(item, runs))
    rows, titles = [], []
    for panel in chart.panels:
        for x, arms in groups.items():
            if has_values(arms, panel):
                rows.append((x, arms, panel, fit_chart(chart, panel)))
                titles.append(f"{panel.label}<br>{x}" if len(groups) > 1 else panel.label)
    figure = stack_panels(titles, axis.label, [fit.zero for *_, fit in rows])
    for row, (x, arms, panel, fit) in enumerate(rows, 1):
        for arm in sorted(arms, key=is_gaf):
            shade = colours[arm.name]
            traces = arm_traces(arm, panel, fit, axis, shade, first=False)
            end = paper_end(item, arm, x, panel, axis)
            if end is not None:
                traces.append(paper_trace(arm.name, shade, [end], panel))
            for trace in traces:
                figure.add_trace(trace, row=row, col=1)
        for tau in thresholds(arms) if fit.thresholds else ():
            add_tau_line(figure, tau, row)
    figure.update_xaxes(unifiedhovertitle_text=axis.hover)
    return figure


def paper_trace(
    arm: str, shade: Shade, points: Sequence[tuple[float, float]], panel: Panel
) -> dict[str, Any]:
    """The paper's values of an arm, (x, y)."""
    common = trace_base(arm, shade)
    return common | {
        "meta": common["meta"] | {"paper": True},
        "mode": "markers",
        "marker": {
            "symbol": "diamond-open",
            "size": 10,
            "color": shade.light,
            "line": {"width": 2},
        },
        "hovertemplate": (
            f"{common['name']}, paper: %{{y:.{panel.digits}f}}{panel.unit}<extra></extra>"
        ),
        "x": [x for x, _ in points],
        "y": [round(y, 5) for _, y in points],
    }


def plotly_against(item: Item, runs: list[Run]) -> Any:
    at, rows = axis_positions(item, runs), measures_with_values(item, runs)
    colours = palette(arm_names(item, runs))
    figure = stack_panels(
        [measure_title(key, measure) for key, measure in rows],
        ACROSS[item.x or ""],
        [False] * len(rows),
    )
    for row, (key, measure) in enumerate(rows, 1):
        found = all_series(item, runs, key, measure)
        for one in found:
            for trace in series_traces(one, at, colours[one.arm], PANELS[key]):
                figure.add_trace(trace, row=row, col=1)
    texts = dict(zip(at.values(), tick_texts(item, at), strict=True))
    figure.update_xaxes(
        tickvals=list(texts), ticktext=list(texts.values()), tickangle=0, tickfont_size=11
    )
    return figure


def series_traces(
    one: Series, at: dict[Position, float], shade: Shade, panel: Panel
) -> list[dict[str, Any]]:
    """The traces of an arm: single seeds, the mean, the paper."""
    traces = [seed_trace(one, at, shade)]
    if one.mean:
        mean = series_mean_trace(one, at, shade, panel)
        traces.append(mean)
        if one.everywhere:
            traces.append(line_across(one, at, shade, mean["y"][0]))
    if one.paper:
        points = [(at[x], value) for x, value in one.paper]
        traces.append(paper_trace(one.arm, shade, points, panel))
    return [trace for trace in traces if trace["x"]]


def seed_trace(one: Series, at: dict[Position, float], shade: Shade) -> dict[str, Any]:
    """A dot for each seed."""
    common = trace_base(one.arm, shade)
    return common | {
        "meta": common["meta"] | {"single": True},
        "mode": "markers",
        "hoverinfo": "skip",
        "opacity": 0.4,
        "x": [at[x] for x, _ in one.dots],
        "y": [round(value, 5) for _, value in one.dots],
        "marker": {"size": 5, "color": shade.light},
    }


def series_mean_trace(
    one: Series, at: dict[Position, float], shade: Shade, panel: Panel
) -> dict[str, Any]:
    texts = []
    for _, mean, deviation, n in one.mean:
        text = f"{mean:.{panel.digits}f}{panel.unit}"
        if deviation is not None:
            text += f" ± {deviation:.{panel.digits}f} (n = {n})"
        texts.append(text)
    return trace_base(one.arm, shade) | {
        "text": texts,
        "hovertemplate": "%{fullData.name}: %{text}<extra></extra>",
        "mode": "lines+markers",
        "x": [at[x] for x, *_ in one.mean],
        "y": [round(mean, 5) for _, mean, *_ in one.mean],
        "line": {"color": shade.light, "width": 3},
        "marker": {"size": 8, "color": shade.light},
    }


def line_across(one: Series, at: dict[Position, float], shade: Shade, y: float) -> dict[str, Any]:
    """A dashed line for an arm that is independent of x."""
    return trace_base(one.arm, shade) | {
        "mode": "lines",
        "x": [min(at.values()), max(at.values())],
        "y": [y, y],
        "line": {"color": shade.light, "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
    }
