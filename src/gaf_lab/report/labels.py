"""Names at the ends of lines, short enough and moved apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from gaf_lab.report.arms import Arm
from gaf_lab.report.cells import thresholds
from gaf_lab.report.palette import CROWD, INK, Shade, darker

if TYPE_CHECKING:  # importing them takes a second
    from matplotlib.axes import Axes

LINE = 0.19  # inches between names


class Label(NamedTuple):
    """A name at a line's end (x, y), in data coordinates; x is None for a line across the axes."""

    x: float | None
    y: float
    text: str
    colour: str


def margin(names: Sequence[str]) -> float:
    """Inches for the names at the lines' ends and the thin lines that lead to them."""
    return 0.2 + lead(len(names)) + 0.085 * max(8, *map(len, short_names(names).values()))


def lead(names: int) -> float:
    """Inches between the axes and the names; more for many, which are moved far."""
    return 0.1 if names <= CROWD else 0.35


def label_ends(ax: "Axes", labels: list[Label]) -> None:
    """Writes the names at the right, moved apart if they would overlap.

    A thin line leads from a line's end to a name that is not beside it.
    """
    if not labels:
        return
    labels = sorted(labels, key=lambda label: label.y)
    low, high = ax.get_ylim()
    tall, gap = ax.bbox.height / ax.figure.dpi, lead(len(labels)) * ax.figure.dpi / ax.bbox.width
    ends = [(label.y - low) / (high - low) for label in labels]
    heights = apart(ends, gap=LINE / tall)
    for height, end, label in zip(heights, ends, labels, strict=True):
        x, _, text, colour = label
        across = 1.0
        if x is not None:
            across = ax.transAxes.inverted().transform(ax.transData.transform((x, label.y)))[0]
        if across < 0.95 or abs(height - end) > LINE / tall / 3:
            bend = ([across, 1.0, 1 + 0.8 * gap], [end, end, height])
            ax.plot(
                *bend,
                transform=ax.transAxes,
                color=colour,
                linewidth=0.6,
                alpha=0.6,
                clip_on=False,
                zorder=2,
            )
        ax.text(
            1 + gap,
            height,
            text,
            transform=ax.transAxes,
            va="center",
            fontsize=10.5,
            color=darker(colour),
            parse_math=False,
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights in [0, 1], moved by least squares to be at least `gap` apart and below 1.

    Those that would overlap form groups, which keep their mean.
    """
    groups: list[tuple[float, int]] = []  # mean of height - place * gap, and how many
    for place, height in enumerate(heights):
        mean, size = height - place * gap, 1
        while groups and groups[-1][0] >= mean:
            other, others = groups.pop()
            mean, size = (mean * size + other * others) / (size + others), size + others
        groups.append((mean, size))
    levels = [mean for mean, size in groups for _ in range(size)]
    return [
        min(level + place * gap, 1 - (len(levels) - 1 - place) * gap)
        for place, level in enumerate(levels)
    ]


def shorten(name: str, length: int = 26) -> str:
    """On one line of at most `length` characters. Cut in the middle: names differ at the end."""
    line = " ".join(name.split())
    if len(line) <= length:
        return line
    tail = length // 2
    return line[: length - tail - 1].rstrip() + "…" + line[-tail:].lstrip()


def short_names(names: Sequence[str], length: int = 26) -> dict[str, str]:
    """The names shortened, each long enough that no two become the same."""
    found = {name: shorten(name, length) for name in names}
    alike = [name for name in names if list(found.values()).count(found[name]) > 1]
    longest = max(map(len, names), default=0)
    return found | short_names(alike, length + 8) if alike and length < longest else found


def draw_taus(ax: "Axes", of: list[Arm], colours: dict[str, Shade]) -> list[Label]:
    """Draws a dashed line at each threshold; returns their labels."""
    found = thresholds(of)
    shades = [colours[names[0]].light if len(found) > 1 else INK for names in found.values()]
    for tau, colour in zip(found, shades, strict=True):
        ax.axhline(tau, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    return [
        Label(None, tau, f"τ = {tau:g}", colour) for tau, colour in zip(found, shades, strict=True)
    ]
