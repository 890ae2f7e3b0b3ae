"""The figures of a report's page, drawn with plotly."""

import html
from collections.abc import Sequence
from typing import Any

from gaf_lab.records.run import Run
from gaf_lab.report.arms import Arm, is_gaf
from gaf_lab.report.cells import cells_of, names_in, selected_point, taus_of, track
from gaf_lab.report.charts import SAMPLES, Axis, Chart, Panel, fit_axis
from gaf_lab.report.labels import shorten
from gaf_lab.report.measures import status
from gaf_lab.report.palette import GRID, SOFT, Shade, palette
from gaf_lab.report.statistics import Curve, Values, curve

MOST = 400  # points of a line in the page


def plotly_chart(runs: list[Run], chart: Chart, axis: Axis = SAMPLES) -> Any:
    """The same as a `plotly.graph_objects.Figure`, without a background.

    Each trace has as `meta` its arm's two colours, "light", in which it is drawn, and "dark", and
    "single": whether it is of one run, and so hidden while more than CROWD arms are shown.
    """
    found, axis = cells_of(runs, chart, axis), fit_axis(axis, runs)
    names = names_in(found)
    colours = palette(names)
    titles = [html.escape(cell.title, quote=False) for cell in found]
    figure = stack_panels(titles, axis.label, [chart.zero] * len(found))
    for row, cell in enumerate(found, 1):
        for arm in sorted(cell.arms, key=is_gaf):  # GAF on top
            for trace in arm_traces(
                arm, cell.panel, chart, axis, colours[arm.name], first=row == 1
            ):
                ranked = trace | {"legendrank": names.index(arm.name)}
                figure.add_trace(ranked, row=row, col=1)
        for tau in taus_of(chart, cell):
            add_tau_line(figure, tau, row)
    if chart.zero:
        figure.update_yaxes(matches="y")
    figure.update_xaxes(unifiedhovertitle_text=axis.hover)
    return figure


def add_tau_line(figure: Any, tau: float, row: int) -> None:
    note = {"annotation_text": f"τ = {tau:g}", "annotation_position": "top right"}
    dash = {"dash": "dash", "width": 1.2, "color": SOFT}
    figure.add_hline(y=tau, line=dash, row=row, col=1, **note)


def stack_panels(titles: Sequence[str], across: str, zeros: Sequence[bool]) -> Any:
    """Axes one above the other, each with its title at the left and numbers along both sides."""
    from plotly.subplots import make_subplots

    rows = len(titles)
    gap = 0.3 / rows if rows > 1 else 0
    figure = make_subplots(rows=rows, shared_xaxes=True, vertical_spacing=gap)
    set_layout(figure)
    figure.update_layout(height=110 + 270 * rows)
    corner = {"xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom"}
    for row, (title, zero) in enumerate(zip(titles, zeros, strict=True), 1):
        domain = figure.layout[f"yaxis{row if row > 1 else ''}"].domain or (0, 1)
        figure.add_annotation(
            text=title, y=domain[1], showarrow=False, align="left", xshift=-40, yshift=6, **corner
        )
        figure.update_yaxes(rangemode="tozero" if zero else "normal", row=row, col=1)
    figure.update_xaxes(showticklabels=True)
    figure.update_xaxes(title_text=across, row=rows, col=1)
    return figure


def set_layout(figure: Any) -> None:
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 12, "t": 52, "b": 48},
        hovermode="x unified",
        showlegend=False,  # the page has one for all its figures
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(showgrid=False, zeroline=False, hoverformat=",.1f", fixedrange=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)


def arm_traces(
    arm: Arm, panel: Panel, chart: Chart, axis: Axis, shade: Shade, first: bool
) -> list[dict[str, Any]]:
    """The arm's runs, their mean, and the selected evaluations.

    first: whether these name the arm in the legend.
    """
    common = trace_base(arm.name, shade)
    mean = curve(arm, panel.key, axis.key)
    made = [
        run_trace(run, panel, axis, shade) for run in arm.runs if len(arm.runs) > 1 or mean is None
    ]
    made = [
        common | {"meta": common["meta"] | {"single": mean is not None}} | line
        for line in made
        if line["x"]
    ]
    if mean is not None:
        made.append(common | mean_trace(mean, panel, axis, shade))
    if made:
        made[-1]["showlegend"] = first
    found = [selected_point(run, panel, axis) for run in arm.runs] if chart.marks else []
    spots = [spot for spot in found if spot]
    if spots:
        circle = {"symbol": "circle-open", "size": 9, "color": shade.light, "line": {"width": 2}}
        x, y = (list(values) for values in zip(*spots, strict=True))
        single = {"meta": common["meta"] | {"single": True}}
        made.append(
            common
            | single
            | {"mode": "markers", "x": x, "y": y, "marker": circle, "hoverinfo": "skip"}
        )
    return made


def trace_base(arm: str, shade: Shade) -> dict[str, Any]:
    """What all traces of an arm have."""
    meta = shade._asdict() | {"single": False}
    return {
        "type": "scatter",
        "name": literal(arm),
        "legendgroup": arm,
        "meta": meta,
        "showlegend": False,
    }


def thin_out(values: Values) -> Values:
    """At most MOST of the values, at even places, the last one included."""
    import numpy as np

    if len(values) <= MOST:
        return values
    kept: Values = values[np.linspace(0, len(values) - 1, MOST).round().astype(int)]
    return kept


def literal(name: str) -> str:
    """The name so that plotly shows it as it is: no tags, and no template %{...}."""
    return html.escape(shorten(name, 60), quote=False).replace("%{", "%\N{ZERO WIDTH SPACE}{")


def run_trace(run: Run, panel: Panel, axis: Axis, shade: Shade) -> dict[str, Any]:
    x, y = (thin_out(values) for values in track(run, panel, axis))
    line = {
        "color": shade.light,
        "width": 1,
        "dash": "solid" if status(run) == "finished" else "dash",
    }
    return {
        "mode": "lines",
        "x": x.tolist(),
        "y": y.round(5).tolist(),
        "line": line,
        "opacity": 0.45,
        "hoverinfo": "skip",
    }


def mean_trace(mean: Curve, panel: Panel, axis: Axis, shade: Shade) -> dict[str, Any]:
    number = f":.{panel.digits}f"
    spread = f" ({{low{number}}} to {{high{number}}})" if mean.n > 1 else ""
    scaled = [
        (thin_out(values) * panel.factor).tolist() for values in (mean.mean, mean.low, mean.high)
    ]
    text = [
        f"{m:.{panel.digits}f}{panel.unit}" + spread.format(low=low, high=high)
        for m, low, high in zip(*scaled, strict=True)
    ]
    line = {"color": shade.light, "width": 3}
    y = [round(value, 5) for value in scaled[0]]
    x = (thin_out(mean.x) / axis.unit).tolist()
    mode = "lines" if len(x) > 1 else "markers"  # a line of one point would be invisible
    return {
        "mode": mode,
        "x": x,
        "y": y,
        "text": text,
        "line": line,
        "hovertemplate": "%{fullData.name}: %{text}<extra></extra>",
    }
