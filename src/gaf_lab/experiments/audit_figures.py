"""The pictures of `gaf audit`: audit.png shows the scores, suspects.png the first suspects."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from gaf_lab.experiments.audit_result import AuditResult
from gaf_lab.experiments.probe_figure import legend_on_top
from gaf_lab.records.output import replace_whole
from gaf_lab.report.figures import DPI, canvas, plain_axes
from gaf_lab.report.labels import shorten
from gaf_lab.report.palette import INK, SOFT

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUSPECTS = 50  # on the sheet
PER_ROW = 10  # pictures in a row of it
NAME_LENGTH = 16  # letters above a picture
RIGHT, WRONG = "#1559c9", "#e0561b"
ROC_CURVES = {
    "quality": ("label quality", "#1559c9"),
    "loss": ("loss", "#12a08a"),
    "disagreement": ("disagreement", "#8c1d4f"),
}


def draw_audit(found: AuditResult, path: Path) -> None:
    """Draws the label quality of clean and flipped samples, and ROC curves. A PNG of 150 dpi.

    Without known wrong labels, the label quality of all samples alone.
    """
    known = bool(found.flipped.any())
    panels = 2 if known else 1
    figure = canvas(5 * panels, 3.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.subplots_adjust(left=0.12 / panels, right=0.98, top=0.87, bottom=0.16, wspace=0.2)
    draw_quality(axes[0], found)
    if known:
        draw_roc(axes[1], found)
    with replace_whole(path) as part:
        figure.savefig(part, dpi=DPI)


def draw_quality(ax: "Axes", found: AuditResult) -> None:
    flipped = found.flipped
    groups = [("all", ~flipped, RIGHT)]
    if flipped.any():
        groups = [("clean", ~flipped, RIGHT), ("flipped", flipped, WRONG)]
    edges = torch.linspace(0, 1, 51).tolist()
    highest = 0.0
    for name, which, color in groups:
        count = torch.histc(found.quality[which].float(), 50, 0, 1)
        share = (100 * count / count.sum()).tolist()
        ax.stairs(share, edges, fill=True, alpha=0.4, color=color, label=name)
        highest = max(highest, *share)
    name_axes(ax, "samples (%)", "label quality; samples.csv begins with the lowest")
    ax.set_ylim(0, 1.15 * highest)
    legend_on_top(ax)


def draw_roc(ax: "Axes", found: AuditResult) -> None:
    """ROC curves of the scores."""
    ax.plot([0, 100], [0, 100], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    for score, values in found.scores.items():
        name, color = ROC_CURVES[score]
        false, true, _ = roc_curve(found.flipped, values)
        ax.plot(100 * false, 100 * true, color=color, linewidth=1.8, label=name)
    name_axes(ax, "flipped found (%)", "clean ones suspected (%)")
    ax.set(ylim=(-3, 128), yticks=range(0, 101, 20))
    legend_on_top(ax, columns=2)


def name_axes(ax: "Axes", title: str, across: str) -> None:
    plain_axes(ax)
    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    ax.set_xlabel(across, fontsize=10, color=SOFT)


def draw_suspects(found: AuditResult, path: Path) -> bool:
    """Draws the first suspects, each with its index or name, given and predicted label, at 150 dpi.

    The labels' colour shows whether the given one is wrong, if that is known.

    Returns:
        Whether the samples are pictures; otherwise nothing is drawn.
    """
    pictures = pictures_of(found)
    if pictures is None:
        return False
    first, known = found.order[:SUSPECTS], bool(found.flipped.any())
    rows = -(-len(first) // PER_ROW)
    height = 0.95 + 1.38 * rows
    figure = canvas(10, height)
    axes = figure.subplots(rows, PER_ROW, squeeze=False).flatten()
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 1.15 / height, bottom=0.02, wspace=0.08, hspace=0.5
    )
    write_title(figure, found, len(first), height)
    for ax in axes:
        ax.axis("off")
    for ax, row in zip(axes, first, strict=False):
        color = INK
        if known:
            color = WRONG if found.flipped[row] else RIGHT
        draw_suspect(ax, found, row, pictures[found.index[row]], color)
    with replace_whole(path) as part:
        figure.savefig(part, dpi=DPI)
    return True


def write_title(figure: "Figure", found: AuditResult, count: int, height: float) -> None:
    name = "the sample's name" if found.samples else "#index in the data set"
    title = f"The {count} samples of lowest label quality: given label → predicted label, {name}"
    figure.text(0.01, 1 - 0.3 / height, title, fontsize=11, color=INK)
    if found.flipped.any():
        at = 1 - 0.55 / height
        figure.text(0.01, at, "in orange: the given label is wrong", fontsize=10, color=WRONG)
        figure.text(0.28, at, "in blue: the given label is right", fontsize=10, color=RIGHT)


def draw_suspect(ax: "Axes", found: AuditResult, row: int, picture: Tensor, color: str) -> None:
    ax.imshow(pixels(picture), cmap="gray", interpolation="nearest")
    size = 7 if found.problem.problem.class_names else 10
    ax.set_title(labels_of(found, row), fontsize=size, color=color, pad=12)
    place: dict[str, Any] = {"ha": "center", "transform": ax.transAxes}
    ax.text(0.5, 1.03, name_of(found, row), fontsize=6 if found.samples else 7, color=SOFT, **place)


def name_of(found: AuditResult, row: int) -> str:
    """The end of a sample's name without folders, which tells files apart; or #index."""
    if not found.samples:
        return f"#{found.origin[row]}"
    name = found.samples[row].rsplit("/", 1)[-1]
    return name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"


def labels_of(found: AuditResult, row: int) -> str:
    """The given label and the suggested one; on two lines if they are long."""
    given, other = (
        found.name_class(found.report[f"{which}_label"][row]) for which in ("given", "predicted")
    )
    if len(given) + len(other) <= NAME_LENGTH - 3:
        return f"{given} → {other}"
    return f"{shorten(given, NAME_LENGTH)}\n→ {shorten(other, NAME_LENGTH - 2)}"


def pictures_of(found: AuditResult) -> Tensor | None:
    """The training samples (N, C, H, W), if they are pictures with classes, of 1 or 3 channels."""
    x = found.problem.train.x
    there = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)
    return x if there and found.problem.classes else None


def pixels(picture: Tensor) -> "np.ndarray[Any, Any]":
    """A picture as matplotlib takes it: (H, W, 3), or (H, W) if it has one channel.

    Other values than bytes are spread over [0, 1].
    """
    if picture.is_floating_point():
        low, high = picture.min(), picture.max()
        picture = (picture - low) / (high - low).clamp_min(1e-12)
    found: np.ndarray[Any, Any] = picture.permute(1, 2, 0).cpu().numpy()
    return found[:, :, 0] if found.shape[2] == 1 else found
