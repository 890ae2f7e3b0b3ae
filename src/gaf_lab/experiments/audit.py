"""gaf audit: trains a config, and ranks its training samples by how likely their labels are wrong.

samples.csv is ranked by label quality, in [0, 1], the most suspect first:

    quality = (1 + p[given] - max of the other p) / 2        p: the model's probabilities, their mean over the evaluations

is_label_issue marks its first m lines. m is the number of wrong labels that the confident joint (Northcutt et al., JAIR 2021) makes
out from p, and needs no truth: a sample counts as of class j where p[j] is at least the mean p[j] of the samples labelled j; the
shares of each label's samples that count as of another class, times how many have that label, add up to m.

Beside it, for comparison: the loss, its mean over the evaluations (as in O2U-Net, ICCV 2019) and at the evaluation that held-out labels
choose; and the filter's own scores of a sample: the mean, over the compared micro-batches that held it, of

    distance of the micro-batch's gradient to the running sum  -  mean distance over the last 100 steps

in cosine distance; 0 is usual, higher is more suspect. `rejection` is the same with 1 for a distance above tau and 0 for one below. Taking
the recent mean away takes out that rejections are rare early on and frequent late; a step's own would leave nothing where k = 2, for
there one row is compared.

samples.csv has a line per training sample; audit.jsonl a line per seed:

    {"kind": "audit", "seed", "b", "k", "samples", "flipped", "auroc": {way: ...}, "precision": {way: ...},
     "issues": {"count", "precision", "recall"}, "selected", "steps_taken"}

precision: share of flipped ones among the most suspect, as many as there are flipped; of issues, among those that are marked. All but
count are null where no label is known to be wrong.
"""

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich import box
from rich.table import Table
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import cross_entropy

import gaf
from gaf.record.audit import Excess, value_per_row
from gaf.rules.sequential import TIE
from gaf_lab.data.problem import Problem
from gaf_lab.records import run as records
from gaf_lab.report import statistics as st
from gaf_lab.report.figures import DPI, INK, SOFT, canvas, plain
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.evaluate import logits
from gaf_lab.training.training import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Corner = Literal["upper right", "lower right"]
WAYS = {
    "quality": "label quality, mean over evaluations",
    "loss": "loss, mean over evaluations",
    "loss_selected": "loss, at the selected evaluation",
    "loss_averaging": "loss, mean over evaluations, plain averaging",
    "distance": "distance, this filter",
    "rejection": "rejection, this filter",
}
RANKING = "quality"  # what samples.csv is ranked by; results/audit.jsonl has what it finds, and the others
SUSPECTS = 50  # on the sheet


class Tally:
    """For each of n samples how far, and how often above tau, the micro-batches were that held it; see gaf.Audit."""

    def __init__(self, n: int) -> None:
        self.distances, self.bits = gaf.Audit(n), Excess(n)

    def add(self, indices: Sequence[Tensor], outcome: gaf.Outcome) -> None:
        """One step; indices: of the k micro-batches, which samples each holds, (b,)."""
        self.distances.record(indices, outcome)
        self.bits.add(
            indices,
            value_per_row(
                [float(d > outcome.tau + TIE) for d in outcome.distances], outcome.distances
            ),
        )

    @property
    def appearances(self) -> Tensor:
        return self.distances.counts

    def score(self) -> Tensor:
        """(n,); 0 for a sample that no compared micro-batch held."""
        return self.distances.scores().nan_to_num(0)

    def rejection(self) -> Tensor:
        return self.bits.scores().nan_to_num(0)


@dataclass(frozen=True, eq=False)
class Audited:
    """What a run has measured of its training samples, (n,) tensors, and of itself.

    Attributes:
        problem: whose samples they are.
        ways: by name, higher for what is more suspect.
        quality: of the given label, in [0, 1]; lower is more suspect.
        predicted: the class that was most probable, on average over the evaluations.
        issues: bool; which labels are held to be wrong.
        appearances: compared micro-batches that held the sample.
        selected: the best held-out accuracy at an evaluation.
        taken: share of steps that were taken.
    """

    problem: Problem
    ways: dict[str, Tensor]
    quality: Tensor
    predicted: Tensor
    issues: Tensor
    appearances: Tensor
    selected: float
    taken: float

    @property
    def flipped(self) -> Tensor:
        return (self.problem.train.observed != self.problem.train.clean).cpu()

    @property
    def order(self) -> list[int]:
        """The most suspect first."""
        found: list[int] = self.quality.argsort(stable=True).tolist()
        return found

    def line(self) -> dict[str, Any]:
        config, flips = self.problem.config, int(self.flipped.sum())
        known = 0 < flips < len(self.flipped)
        auroc = {
            way: float(roc_auc_score(self.flipped, value)) if known else None
            for way, value in self.ways.items()
        }
        top = {
            way: float(self.flipped[value.argsort(descending=True)[:flips]].double().mean())
            if known
            else None
            for way, value in self.ways.items()
        }
        sizes = {
            "seed": config.seed,
            "dataset": config.dataset,
            "noise": config.noise,
            "noise_rate": config.noise_rate,
            "b": config.b,
            "k": config.k,
        }
        right = float(self.flipped[self.issues].sum())
        marked = int(self.issues.sum())
        issues = {
            "count": marked,
            "precision": right / marked if known and marked else None,
            "recall": right / flips if known else None,
        }
        found = {
            "samples": len(self.flipped),
            "flipped": flips,
            "auroc": auroc,
            "precision": top,
            "issues": issues,
        }
        return {
            "kind": "audit",
            **sizes,
            **found,
            "selected": self.selected,
            "steps_taken": self.taken,
        }


def audit(
    config: TrainConfig, data_folder: Path | None, progress: Callable[[str, int, int], None]
) -> Audited:
    """Trains the config, and plain averaging beside it, on the same micro-batches.

    Args:
        config: of the filtered run; averaging's differs in its policy alone.
        data_folder: with the data set's archive; None downloads it.
        progress: called with what runs, the step, and the number of steps.

    Raises:
        ConfigError, DataError: where something given cannot be used.
        Diverged: where the training does.
    """
    check(config)
    training = Training(dataclasses.replace(config, engine="plain"), data_folder)
    tally = Tally(len(training.problem.train))
    looks, selected, taken = followed(training, tally, lambda *at: progress("filtering", *at))
    plainly = Training(dataclasses.replace(config, policy="mean", engine="plain"), data_folder)
    others, _, _ = followed(plainly, None, lambda *at: progress("averaging", *at))
    best = max(range(len(selected)), key=lambda i: selected[i])
    given = training.problem.train.observed.cpu()
    p = looks.probabilities / len(looks.losses)
    quality = label_quality(p, given)
    ways = {
        "quality": 1 - quality,
        "loss": torch.stack(looks.losses).mean(0),
        "loss_selected": looks.losses[best],
        "loss_averaging": torch.stack(others.losses).mean(0),
        "distance": tally.score(),
        "rejection": tally.rejection(),
    }
    return Audited(
        training.problem,
        ways,
        quality,
        p.argmax(1),
        worst(quality, wrong_labels(p, given)),
        tally.appearances,
        selected[best],
        taken,
    )


def label_quality(p: Tensor, given: Tensor) -> Tensor:
    """(1 + p[given] - max of the other p) / 2, (n,) in [0, 1]; below 1/2 where another class is more probable.

    Args:
        p: probabilities (n, classes), which add up to 1 in each row.
        given: labels (n,).
    """
    own = p.gather(1, given[:, None])[:, 0]
    other = p.scatter(1, given[:, None], 0).amax(1)
    return (1 + own - other) / 2


def wrong_labels(p: Tensor, given: Tensor) -> int:
    """About how many labels are wrong, by the confident joint of probabilities (n, classes) and given labels (n,)."""
    classes = p.shape[1]
    # NaN for a label that no sample has: nothing counts as of that class
    usual = torch.stack([p[given == j, j].mean() for j in range(classes)])
    confident = p >= usual
    sure = confident.any(1)
    counted = torch.where(confident, p, -1).argmax(1)
    pairs = torch.bincount(given[sure] * classes + counted[sure], minlength=classes**2)
    joint = pairs.view(classes, classes).double()
    shares = joint / joint.sum(1, keepdim=True).clamp(min=1)
    labelled = torch.bincount(given, minlength=classes)
    return round(float((labelled * (shares.sum(1) - shares.diagonal())).sum()))


def worst(quality: Tensor, count: int) -> Tensor:
    """(n,) bool: the samples of lowest quality, so many of them."""
    marked = torch.zeros(len(quality), dtype=torch.bool)
    marked[quality.argsort(stable=True)[:count]] = True
    return marked


def check(config: TrainConfig) -> None:
    if config.policy != "gaf" or config.scope != "all" or config.start != "first":
        raise ConfigError("policy must be 'gaf' with scope 'all' and start 'first' for an audit, for it looks at distances to the running "
                          f"sum; got {config.policy!r}, {config.scope!r} and {config.start!r}. Leave them at their defaults.")  # fmt: skip
    if config.k < 2:
        raise ConfigError(
            f"k must be at least 2 for an audit; got {config.k}. One micro-gradient has nothing to agree with."
        )
    if config.dataset == "imagenet":
        raise ConfigError("dataset must be in memory for an audit; got 'imagenet'. Use another.")


@dataclass(eq=False)
class Looks:
    """A model's outputs for each training sample, in evaluation mode, at one evaluation after the other: losses (n,) with its observed
    label, and the sum of its probabilities (n, classes)."""

    losses: list[Tensor]
    probabilities: Tensor

    @torch.no_grad()
    def add(self, training: Training) -> None:
        train = training.problem.train
        found = logits(training.model, training.problem, train)
        loss = cross_entropy(found, train.observed, reduction="none")
        self.losses.append(loss.double().cpu())
        self.probabilities += found.softmax(1).double().cpu()


def followed(
    training: Training, tally: Tally | None, progress: Callable[[int, int], None]
) -> tuple[Looks, list[float], float]:
    """Trains to the end. What it says of the samples, and held-out accuracy, at every evaluation; the share of steps that were taken."""
    problem, accuracies, taken = training.problem, [], 0
    looks = Looks([], torch.zeros(len(problem.train), problem.classes, dtype=torch.float64))
    while training.step < problem.steps:
        indices = [problem.index(training.step, i).cpu() for i in range(training.config.k)]
        outcome = training.macro_batch()
        taken += outcome.stepped
        if tally is not None:
            tally.add(indices, outcome)
        if problem.evaluation(training.step) or training.step == problem.steps:
            looks.add(training)
            accuracies.append(float(training.evaluation()["heldout_accuracy"] or 0))
        progress(training.step, problem.steps)
    return looks, accuracies, taken / problem.steps


# --- showing ------------------------------------------------------------------------------------------------------


def write_samples(found: Audited, path: Path) -> None:
    """A line per training sample, the most suspect first; index is the data set's own. true_label and flipped are empty where no wrong
    label is known."""
    known = bool(found.flipped.any())
    train = found.problem.train
    with records.whole(path) as part, part.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([
            "index", "given_label", "predicted_label", "label_quality", "is_label_issue",
            *(way for way in WAYS if way != RANKING), "appearances", "true_label", "flipped",
        ])  # fmt: skip
        for i in found.order:
            said = [int(train.observed[i]), int(found.predicted[i])]
            values = [f"{float(found.ways[way][i]):.6g}" for way in WAYS if way != RANKING]
            truth = [int(train.clean[i]), int(found.flipped[i])] if known else ["", ""]
            out.writerow([
                int(found.problem.origin[i]), *said, f"{float(found.quality[i]):.6g}", int(found.issues[i]),
                *values, int(found.appearances[i]), *truth,
            ])  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> Table:
    result = Table(title="Wrong labels found", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("way", "AUROC", "precision", "n"):
        result.add_column(column, justify="left" if column == "way" else "right")
    for way, name in WAYS.items():
        result.add_row(
            name, spelled(lines, "auroc", way), spelled(lines, "precision", way), str(len(lines))
        )
    return result


def spelled(lines: Sequence[dict[str, Any]], measure: str, way: str) -> str:
    values = [line[measure][way] for line in lines if line[measure][way] is not None]
    if not values:
        return "unknown"
    mean = sum(values) / len(values)
    deviation = (
        math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else None
    )
    return f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def verdict(lines: Sequence[dict[str, Any]]) -> str:
    """One sentence on the best ranking and on samples.csv; then one on those marked, and one on the others."""
    marked = mean_of(line["issues"]["count"] for line in lines)
    known = [line for line in lines if line["auroc"][RANKING] is not None]
    if not known:
        return (f"samples.csv is ranked by {WAYS[RANKING]}; which labels are wrong is not known here, and nothing tells how good the "
                f"ranking is. is_label_issue marks its first {marked:.0f} lines.")  # fmt: skip
    means = {way: mean_of(line["auroc"][way] for line in known) for way in WAYS}
    best = max(means, key=lambda way: means[way])
    ranked = ", by which samples.csv is ranked." if best == RANKING else (
        f"; samples.csv is ranked by {WAYS[RANKING]} (AUROC {means[RANKING]:.3f}), which was chosen beforehand.")  # fmt: skip
    precise = [
        line["issues"]["precision"] for line in known if line["issues"]["precision"] is not None
    ]
    recall = mean_of(line["issues"]["recall"] for line in known)
    share = f"{100 * mean_of(precise):.0f}% of which are wrong, " if precise else ""
    return (f"Best at finding wrong labels: {WAYS[best]} (AUROC {means[best]:.3f}){ranked} "
            f"is_label_issue marks its first {marked:.0f} lines, {share}{100 * recall:.0f}% of all wrong labels. "
            f"The filter's own distance has AUROC {means['distance']:.3f}; label quality less the mean loss of plain averaging, "
            f"the usual way, is {gap(known)}.")  # fmt: skip


def mean_of(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def gap(lines: Sequence[dict[str, Any]]) -> str:
    """AUROC of label quality less that of the loss under plain averaging: the mean over seeds, with its paired bootstrap interval."""
    pairs = np.array([line["auroc"][RANKING] - line["auroc"]["loss_averaging"] for line in lines])
    low, high = st.bootstrap(pairs)
    return f"{pairs.mean():+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if len(pairs) > 1 else "")


def draw(found: Audited, path: Path) -> None:
    """Left: the label quality of clean and of flipped samples. Right, where wrong labels are known: ROC curves. A PNG of 150 dpi."""
    quality, flipped = found.quality, found.flipped
    panels = 2 if flipped.any() else 1
    figure = canvas(5 * panels, 3.8)
    left, *rest = figure.subplots(1, panels, squeeze=False)[0]
    figure.subplots_adjust(left=0.12 / panels, right=0.98, top=0.87, bottom=0.16, wspace=0.2)
    groups = (
        [("clean", ~flipped, "#1559c9"), ("flipped", flipped, "#e0561b")]
        if flipped.any()
        else [("all", ~flipped, "#1559c9")]
    )
    for name, which, color in groups:
        count = torch.histc(quality[which].float(), 50, 0, 1)
        left.stairs(
            (100 * count / count.sum()).tolist(),
            torch.linspace(0, 1, 51).tolist(),
            fill=True,
            alpha=0.4,
            color=color,
            label=name,
        )
    across = "label quality; samples.csv begins with the lowest"
    dress(left, "samples (%)", across, "upper right")
    for right in rest:
        compare(right, found)
    with records.whole(path) as part:
        figure.savefig(part, dpi=DPI)


def compare(ax: "Axes", found: Audited) -> None:
    """ROC curves of the ways to rank."""
    ax.plot([0, 100], [0, 100], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    curves = {
        "quality": ("label quality", "#1559c9"),
        "loss": ("loss", "#12a08a"),
        "loss_averaging": ("loss, averaging", "#8c1d4f"),
        "distance": ("distance", "#e0561b"),
    }
    for way, (name, color) in curves.items():
        false, true, _ = roc_curve(found.flipped, found.ways[way])
        ax.plot(100 * false, 100 * true, color=color, linewidth=1.8, label=name)
    dress(ax, "flipped found (%)", "clean ones suspected (%)", "lower right")


def dress(ax: "Axes", title: str, across: str, corner: Corner) -> None:
    plain(ax)
    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    ax.set_xlabel(across, fontsize=10, color=SOFT)
    ax.legend(frameon=False, fontsize=9.5, labelcolor=SOFT, loc=corner)


def draw_suspects(found: Audited, path: Path) -> None:
    """The first suspects as pictures, each with its index, given and predicted label; where wrong labels are known, whether it is one.
    A PNG of 150 dpi."""
    first, known = found.order[:SUSPECTS], bool(found.flipped.any())
    rows = -(-len(first) // 10)
    figure = canvas(10, 0.75 + 1.38 * rows)
    axes = figure.subplots(rows, 10, squeeze=False).flatten()
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - 0.95 / (0.75 + 1.38 * rows),
        bottom=0.02,
        wspace=0.08,
        hspace=0.5,
    )
    figure.text(
        0.01, 1 - 0.3 / (0.75 + 1.38 * rows), title_of(found, len(first)), fontsize=11, color=INK
    )
    for ax in axes:
        ax.axis("off")
    for ax, i in zip(axes, first, strict=False):
        ax.imshow(picture(found.problem, i), cmap="gray", interpolation="nearest")
        given, predicted = int(found.problem.train.observed[i]), int(found.predicted[i])
        color = "#e0561b" if known and found.flipped[i] else "#1559c9" if known else INK
        ax.set_title(f"{given} → {predicted}", fontsize=10, color=color, pad=12)
        ax.text(
            0.5,
            1.03,
            f"#{int(found.problem.origin[i])}",
            fontsize=7,
            color=SOFT,
            ha="center",
            transform=ax.transAxes,
        )
    with records.whole(path) as part:
        figure.savefig(part, dpi=DPI)


def title_of(found: Audited, count: int) -> str:
    text = f"The {count} samples of lowest label quality: given label → predicted label, #index in the data set"
    return text + ("; orange: wrong, blue: right" if found.flipped.any() else "")


def picture(problem: Problem, i: int) -> "np.ndarray[Any, Any]":
    """Training picture i as matplotlib takes it: (H, W, 3), or (H, W) where it has one channel."""
    assert isinstance(problem.train.x, Tensor)
    found: np.ndarray[Any, Any] = problem.train.x[i].permute(1, 2, 0).cpu().numpy()
    return found[:, :, 0] if found.shape[2] == 1 else found
