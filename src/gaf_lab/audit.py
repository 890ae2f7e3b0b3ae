"""gaf audit: trains a config, and ranks its training samples by how often the filter turned away the micro-batches that held them.

A sample's score is the mean, over the compared micro-batches that held it, of

    distance of the micro-batch's gradient to the running sum  -  mean distance over the last 100 steps

in cosine distance; 0 is usual, higher is more suspect. `rejection` is the same with 1 for a distance above tau and 0 for one below. Taking
the recent mean away takes out that rejections are rare early on and frequent late; a step's own would leave nothing where k = 2, for
there one row is compared. The usual way, for comparison, is the loss:
its mean over the evaluations (as in O2U-Net, ICCV 2019), and at the evaluation that held-out labels choose.

samples.csv has a line per training sample; audit.jsonl a line per seed:

    {"kind": "audit", "seed", "b", "k", "samples", "flipped", "auroc": {way: ...}, "precision": {way: ...}, "selected", "steps_taken"}

precision: share of flipped ones among the most suspect, as many as there are flipped. Both are null where no label is known to be wrong.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import cross_entropy

import gaf
from gaf.audit import Excess, judged
from gaf.sequential import TIE
from gaf_lab import statistics as st
from gaf_lab.config import ConfigError, TrainConfig
from gaf_lab.evaluate import logits
from gaf_lab.figures import DPI, INK, SOFT, canvas, plain
from gaf_lab.problem import Problem
from gaf_lab.train import Training

WAYS = {
    "score": "distance, this filter",
    "rejection": "rejection, this filter",
    "loss": "loss, mean over evaluations",
    "loss_selected": "loss, at the selected evaluation",
    "loss_averaging": "loss, mean over evaluations, plain averaging",
}


class Tally:
    """For each of n samples how far, and how often above tau, the micro-batches were that held it; see gaf.Audit."""

    def __init__(self, n: int) -> None:
        self.distances, self.bits = gaf.Audit(n), Excess(n)

    def add(self, indices: Sequence[Tensor], outcome: gaf.Outcome) -> None:
        """One step; indices: of the k micro-batches, which samples each holds, (b,)."""
        self.distances.record(indices, outcome)
        self.bits.add(
            indices,
            judged([float(d > outcome.tau + TIE) for d in outcome.distances], outcome.distances),
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
    """What a run tells of its training samples: (n,) tensors, and the run's own numbers."""

    problem: Problem
    ways: dict[str, Tensor]
    appearances: Tensor
    selected: float
    taken: float

    @property
    def flipped(self) -> Tensor:
        return (self.problem.train.observed != self.problem.train.clean).cpu()

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
        found = {"samples": len(self.flipped), "flipped": flips, "auroc": auroc, "precision": top}
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
    losses, selected, taken = followed(training, tally, lambda *at: progress("filtering", *at))
    plainly = Training(dataclasses.replace(config, policy="mean", engine="plain"), data_folder)
    others, _, _ = followed(plainly, None, lambda *at: progress("averaging", *at))
    best = max(range(len(selected)), key=lambda i: selected[i])
    ways = {
        "score": tally.score(),
        "rejection": tally.rejection(),
        "loss": torch.stack(losses).mean(0),
        "loss_selected": losses[best],
    }
    return Audited(
        training.problem,
        ways | {"loss_averaging": torch.stack(others).mean(0)},
        tally.appearances,
        selected[best],
        taken,
    )


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


def followed(
    training: Training, tally: Tally | None, progress: Callable[[int, int], None]
) -> tuple[list[Tensor], list[float], float]:
    """Trains to the end. Losses (n,) and held-out accuracy at every evaluation; the share of steps that were taken."""
    problem, losses, accuracies, taken = training.problem, [], [], 0
    while training.step < problem.steps:
        indices = [problem.index(training.step, i).cpu() for i in range(training.config.k)]
        outcome = training.macro_batch()
        taken += outcome.stepped
        if tally is not None:
            tally.add(indices, outcome)
        if problem.evaluation(training.step) or training.step == problem.steps:
            losses.append(sample_losses(training))
            accuracies.append(float(training.evaluation()["heldout_accuracy"] or 0))
            progress(training.step, problem.steps)
    return losses, accuracies, taken / problem.steps


@torch.no_grad()
def sample_losses(training: Training) -> Tensor:
    """Cross-entropy of every training sample with its observed label, (n,), in evaluation mode."""
    train = training.problem.train
    return (
        cross_entropy(
            logits(training.model, training.problem, train), train.observed, reduction="none"
        )
        .double()
        .cpu()
    )


# --- showing ------------------------------------------------------------------------------------------------------


def write_samples(found: Audited, path: Path) -> None:
    """A line per training sample, the most suspect first; index is the data set's own. flipped is empty where no wrong label is known."""
    order = found.ways["score"].argsort(descending=True).tolist()
    known = bool(found.flipped.any())
    train = found.problem.train
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "rank",
                "index",
                "observed",
                "clean",
                "flipped",
                "appearances",
                "score",
                "rejection",
                "loss",
            ]
        )
        for rank, i in enumerate(order, 1):
            labels = [
                int(train.observed[i]),
                int(train.clean[i]),
                int(found.flipped[i]) if known else "",
            ]
            values = [f"{float(found.ways[way][i]):.6g}" for way in ("score", "rejection", "loss")]
            out.writerow(
                [rank, int(found.problem.origin[i]), *labels, int(found.appearances[i]), *values]
            )


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
    known = [line for line in lines if line["auroc"]["score"] is not None]
    if not known:
        return "Which labels are wrong is not known here: samples.csv is ranked by score, and nothing tells how good the ranking is."
    means = {way: sum(line["auroc"][way] for line in known) / len(known) for way in WAYS}
    best = max(means, key=lambda way: means[way])
    return (f"Best at finding wrong labels: {WAYS[best]} (AUROC {means[best]:.3f}); the filter's score has {means['score']:.3f}. "
            f"Less the mean loss of plain averaging, the usual way, that is {gap(known)}.")  # fmt: skip


def gap(lines: Sequence[dict[str, Any]]) -> str:
    """AUROC of the score less that of the loss under plain averaging: the mean over seeds, with its paired bootstrap interval."""
    pairs = np.array([line["auroc"]["score"] - line["auroc"]["loss_averaging"] for line in lines])
    low, high = st.bootstrap(pairs)
    return f"{pairs.mean():+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if len(pairs) > 1 else "")


def draw(found: Audited, path: Path) -> None:
    """Left: the score of clean and of flipped samples. Right: ROC curves. A PNG of 150 dpi."""
    figure = canvas(10, 3.8)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.87, bottom=0.16, wspace=0.2)
    score, flipped = found.ways["score"], found.flipped
    groups = (
        [("clean", ~flipped, "#1559c9"), ("flipped", flipped, "#e0561b")]
        if flipped.any()
        else [("all", ~flipped, "#1559c9")]
    )
    low, high = float(score.min()), float(score.max())
    for name, which, color in groups:
        count = torch.histc(score[which].float(), 50, low, high)
        left.stairs(
            (100 * count / count.sum()).tolist(),
            torch.linspace(low, high, 51).tolist(),
            fill=True,
            alpha=0.4,
            color=color,
            label=name,
        )
    right.plot([0, 100], [0, 100], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    curves = {
        "score": ("distance", "#e0561b"),
        "loss": ("loss", "#12a08a"),
        "loss_averaging": ("loss, averaging", "#8c1d4f"),
    }
    for way, (name, color) in curves.items():
        if flipped.any():
            false, true, _ = roc_curve(flipped, found.ways[way])
            right.plot(100 * false, 100 * true, color=color, linewidth=1.8, label=name)
    for ax, title, x in (
        (left, "samples (%)", "score: mean excess distance"),
        (right, "flipped found (%)", "clean ones suspected (%)"),
    ):
        plain(ax)
        ax.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
        ax.set_xlabel(x, fontsize=10, color=SOFT)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(
                frameon=False,
                fontsize=9.5,
                labelcolor=SOFT,
                loc="upper right" if ax is left else "lower right",
            )
    figure.savefig(path, dpi=DPI)
