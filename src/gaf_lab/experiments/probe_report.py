"""What `gaf probe` prints, from the lines of its probes: two tables, and a recommendation."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from gaf.measure.advice import format_number
from gaf_lab.experiments.probe import JACKKNIFE_PARTS
from gaf_lab.experiments.probe_point import ProbeLine

CLOSE = 0.1  # a prediction within ten points is taken to hold
WIDE = 0.2  # a tau whose interval is wider is not recommended


def table(lines: Sequence[ProbeLine]) -> Table:
    result = Table(
        title="Micro-gradients: how far they agree, and the tau that follows",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    noise = ("B/(b+B)", "B (95%)", "d_eff")
    for column in ("after", "b", "distance", *noise, "tau", "accepted", "steps"):
        result.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        result.add_row(*probe_cells(line))
    k = lines[0]["k"]
    result.caption = (
        "distance: the mean of pairs, beside the distance expected from B. tau: recommended. "
        f"accepted: of the {k - 1} compared micro-gradients of k = {k}, as predicted from half of "
        "them (as measured on the other half). steps: taken, as measured. "
        "A larger b: measured micro-gradients were merged."
    )
    return result


def probe_cells(line: ProbeLine) -> list[str]:
    """A row of the table; the state's own facts are shown at m = 1 alone."""
    after = noise = dimension = ""
    if line["m"] == 1:
        after = f"{line['after']:,}"
        noise = (
            f"{number_or_infinity(line['noise_scale'])} "
            f"({number_or_infinity(line['noise_low'])}-{number_or_infinity(line['noise_high'])})"
        )
        dimension = number_or_infinity(line["dimension"])
    return [
        after,
        str(line["b"]),
        f"{line['distance_mean']:.3f}",
        f"{line['distance_expected']:.3f}",
        noise,
        dimension,
        f"{line['tau']:.3f}",
        f"{100 * line['predicted']:.0f}% ({100 * line['measured']:.0f}%)",
        f"{100 * line['measured_steps']:.0f}%",
    ]


def number_or_infinity(value: float | None) -> str:
    return "∞" if value is None else format_number(value)


def layer_table(line: ProbeLine) -> Table:
    result = Table(
        title=f"Layers, after {line['after']:,} steps, b = {line['b']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("layer", "distance", "10% to 90%", "B", "d_eff"):
        result.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for part in line["layers"]:
        low, middle, high = part["distance"]
        distances = ("-", "-") if middle is None else (f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
        noise = number_or_infinity(part["noise_scale"])
        result.add_row(part["name"], *distances, noise, number_or_infinity(part["dimension"]))
    return result


def verdicts(lines: Sequence[ProbeLine]) -> Iterator[str]:
    """Each estimate in words, its reason, and whether the measurement confirms the prediction."""
    for line in (line for line in lines if line["m"] == 1):
        gap = abs(line["predicted"] - line["measured"])
        holds = "the prediction holds"
        if gap > CLOSE:
            holds = "the prediction does not hold: measure more with --rows"
        text = (
            f"After {line['after']:,} steps: the estimate is tau = {line['tau']:.3f}. "
            f"{line['reason']} Measured on {other_rows(line)} other micro-gradients: "
            f"{100 * line['measured']:.1f}%, {100 * gap:.1f} points away; {holds}."
        )
        if line["absent"]:
            text += f" {line['absent']} micro-gradients were zero, NaN or infinite, and left out."
        yield text


def recommendation(lines: Sequence[ProbeLine]) -> str:
    """The tau to use, with n and its interval, from the state that was trained furthest.

    Or the reason why none can be recommended.
    """
    line = [line for line in lines if line["m"] == 1][-1]
    sample = (
        f"{line['rows']} micro-gradients of b = {line['b']} after {line['after']:,} steps, one seed"
    )
    why = doubt(line)
    if why:
        return f"No tau is recommended, from {sample}: {why}"
    (low, high), (least, most) = line["tau_interval"], line["measured_interval"]
    return (
        f"Recommended: --tau {line['tau']:.3f} (95% interval {low:.3f} to {high:.3f}), "
        f"from {sample}. Of those compared it should accept {100 * line['predicted']:.0f}%; "
        f"of {other_rows(line)} others it accepted {100 * line['measured']:.0f}% "
        f"({100 * least:.0f} to {100 * most:.0f}%). The accuracy of the training is not measured."
    )


def doubt(line: ProbeLine) -> str:
    """Why nothing can be recommended, and what to do; empty if something can."""
    if line["noise_scale"] is None or line["noise_high"] is None:
        return doubt_of_direction(line)
    if line["tau_interval"] is None:
        least = max(4 * JACKKNIFE_PARTS, 4 * line["k"])
        return (
            f"they are too few for an interval at k = {line['k']}. Raise --rows to {least} or more."
        )
    (low, high), (least, most) = line["tau_interval"], line["measured_interval"]
    if high - low > WIDE:
        return f"it may lie anywhere from {low:.2f} to {high:.2f}. Raise --rows."
    if not least - CLOSE <= line["predicted"] <= most + CLOSE:
        return (
            f"of {other_rows(line)} others tau = {line['tau']:.3f} accepted "
            f"{100 * least:.0f} to {100 * most:.0f}%, and {100 * line['predicted']:.0f}% were "
            "predicted. Raise --rows."
        )
    return ""


def doubt_of_direction(line: ProbeLine) -> str:
    low = ""
    if line["noise_low"] is not None:
        low = f" (B may be anything from {format_number(line['noise_low'])} samples up)"
    return (
        f"no common direction can be distinguished from noise{low}. "
        "Raise --b or --rows, or probe --after more steps."
    )


def other_rows(line: ProbeLine) -> int:
    """Micro-gradients that no prediction was made from."""
    return int(line["rows"]) - int(line["rows"]) // 2
