"""gaf probe: what a config's micro-gradients are like after so many steps of training, which tau suits them, and whether that holds.

A probe's line says all that table and figure show:

    {"kind": "probe", "after", "steps_taken", "k", "b", "m", "rows", "absent",
     "distance_mean", "distance_expected", "distance": [10%, 50%, 90%], "noise_scale", "noise_low", "noise_high", "dimension",
     "tau", "tau_interval", "predicted", "measured", "measured_interval", "measured_steps", "reason", "bins": [...],
     "curve": [[tau, predicted, measured, measured steps], ...],
     "layers": [{"name", "distance": [10%, 50%, 90%], "noise_scale", "dimension"}, ...]}

after, steps_taken: steps of training before it, and those that moved the weights. m: how many measured micro-gradients were
merged into one, b being the samples in it then; noise_scale, dimension and all that is predicted are from m = 1. distance_expected:
B / (b + B). tau_interval, measured_interval: [low, high] of 95%, by leaving out an eighth of the rows at a time; null where m is not 1
and where the rows are too few. bins: pairs by cosine distance, 100 bins over [0, 2]. measured: on micro-gradients that nothing was
predicted from.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from gaf.measure.probe import Probe, Recommendation, number, of_losses
from gaf.rules.agreement import expected_cosine
from gaf_lab.progress import Tell, silent
from gaf_lab.records import environment
from gaf_lab.records import run as records
from gaf_lab.report.figures import DPI, INK, SOFT, canvas, plain
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.rules import MOST_STEPS
from gaf_lab.training.training import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 100
QUANTILES = (0.1, 0.5, 0.9)
TAUS = [round(0.2 + 0.025 * i, 3) for i in range(41)]  # 0.2 to 1.2
MULTIPLES = (1, 2, 4, 8)
CLOSE = 0.1  # a prediction within ten points is taken to hold
WIDE = 0.2  # a tau that is not known to within that much is not recommended
PARTS, STUDENT = (
    8,
    2.365,
)  # of each half of the rows; 97.5% of Student's t with 7 degrees of freedom
MOST_SLICES = 1000
SHADES = {1: "#1559c9", 2: "#12a08a", 4: "#e0561b", 8: "#8c1d4f"}


@dataclass(frozen=True, eq=False)
class Looked:
    """A probe after so many steps of training, `taken` of which moved the weights, at micro-batches merged m at a time."""

    after: int
    taken: int
    m: int
    probe: Probe
    advice: Recommendation
    tau_interval: list[float] | None
    measured_interval: list[float] | None

    def line(self) -> dict[str, Any]:
        return self._line

    @cached_property
    def _line(self) -> dict[str, Any]:
        noise, merged = self.probe.noise, self.probe.merged(self.m)
        distances = merged.distances()
        curve = [(tau, self.probe.predicted(tau, self.m), merged.measured(tau)) for tau in TAUS]
        found = {
            "kind": "probe", "after": self.after, "steps_taken": self.taken, "k": merged.k, "b": merged.b, "m": self.m, "rows": len(merged),
            "absent": merged.absent, "distance_mean": float(distances.mean()),
            "distance_expected": 1 - expected_cosine(noise.rho / self.m, 1),
            "distance": spread(distances), "noise_scale": noise.scale, "noise_low": noise.low, "noise_high": noise.high,
            "dimension": noise.dimension, "tau": self.advice.tau, "tau_interval": self.tau_interval, "predicted": self.advice.predicted,
            "measured": self.advice.measured.rows, "measured_interval": self.measured_interval,
            "measured_steps": self.advice.measured.steps, "reason": self.advice.reason,
            "bins": torch.histc(distances, BINS, 0, 2).int().tolist(), "curve": [[t, p, a.rows, a.steps] for t, p, a in curve],
            "layers": [layer(merged, name) for name in merged.layers] if self.m == 1 else [],
        }  # fmt: skip
        rounded: dict[str, Any] = round_off(records.plain(found))
        return rounded


def layer(probe: Probe, name: str) -> dict[str, Any]:
    noise, distances = probe.noise_in(name), probe.distances(name)
    return {
        "name": name,
        "distance": spread(distances),
        "noise_scale": noise.scale,
        "dimension": noise.dimension,
    }


def spread(distances: Tensor) -> list[float | None]:
    """10%, 50% and 90% of the distances; null where a layer's gradients are all zero."""
    if not len(distances):
        return [None] * len(QUANTILES)
    found: list[float | None] = distances.quantile(
        torch.tensor(QUANTILES, dtype=torch.float64)
    ).tolist()
    return found


def round_off(value: Any) -> Any:
    """Floats to six digits: no figure shows more."""
    if isinstance(value, dict):
        return {key: round_off(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_off(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- measuring ---------------------------------------------------------------------------------------------------


def look(
    config: TrainConfig,
    after: Sequence[int],
    data_folder: Path | None,
    rows: int,
    slices: int,
    share: float,
    chance: float,
    tell: Tell = silent,
) -> Iterator[Looked]:
    """Trains the config, and probes it after each of these numbers of steps, at b and at multiples of it. tell: how far it is.

    Raises:
        ConfigError, DataError, OSError: where something given cannot be used.
        Diverged: where the training before the probe does.
        ValueError: where too few micro-gradients can be used.
    """
    check(config, after, rows, slices, share, chance)
    training = Training(dataclasses.replace(config, engine="plain"), data_folder)
    check_room(training, rows, slices)
    for steps in sorted(set(after)):
        while training.step < steps:
            training.macro_batch()
            tell("training", training.step, steps)
        found = probed(training, rows, slices, tell)
        taken = int(training.accumulator.stats()["stepped"])
        for m in multiples(found):
            advice = found.recommend(share, chance, m)
            ends = intervals(found, advice.tau, share, chance) if m == 1 else (None, None)
            yield Looked(steps, taken, m, found, advice, *ends)


def intervals(
    probe: Probe, tau: float, share: float, chance: float
) -> tuple[list[float] | None, list[float] | None]:
    """95% intervals of the recommended tau, and of what `tau` accepts of the other half: the jackknife over an eighth of each half.

    None where fewer rows would be left than the halves need.
    """
    half = len(probe) // 2
    if half < 2 * PARTS or half - half // PARTS - 1 < probe.k:
        return None, None
    less = [without(probe, part) for part in range(PARTS)]
    taus = [one.recommend(share, chance).tau for one in less]
    return interval(tau, taus, 2), interval(
        probe.measured(tau).rows, [one.measured(tau).rows for one in less], 1
    )


def without(probe: Probe, part: int) -> Probe:
    """The probe without every eighth row of each half."""
    half = len(probe) // 2
    left = torch.tensor(
        [i for i in range(len(probe)) if (i if i < half else i - half) % PARTS != part]
    )
    return Probe(probe.b, probe.k, probe.gram[left][:, left], {}, probe.absent)


def interval(value: float, less: Sequence[float], highest: float) -> list[float]:
    """From a value, and what it is without each of the parts; within [0, highest]."""
    mean = sum(less) / len(less)
    error = math.sqrt((len(less) - 1) / len(less) * sum((one - mean) ** 2 for one in less))
    return [max(0.0, value - STUDENT * error), min(highest, value + STUDENT * error)]


def check_room(training: Training, rows: int, slices: int) -> None:
    """ConfigError where the rows, or their Gram matrices, do not fit into memory."""
    sizes = [p.numel() for p in training.model.parameters()]
    what = f"rows = {rows:,} micro-gradients of {sum(sizes):,} numbers, in {slices:,} slices"
    slice_ = max(sum(sizes) // slices, *sizes)  # a parameter stays whole
    size = rows * slice_ * 4 + rows * rows * 8 * (len(sizes) + 1)
    environment.check_memory(what, size, "Lower rows, or raise slices.")


def check(
    config: TrainConfig,
    after: Sequence[int],
    rows: int,
    slices: int,
    share: float = 0.5,
    chance: float = 0.05,
) -> None:
    rules = {
        "k": (
            config.k,
            config.k >= 2,
            "must be at least 2 for a probe",
            "One micro-gradient has nothing to agree with.",
        ),
        "sam": (
            config.sam,
            not config.sam,
            "must be 0 for a probe",
            "It looks at gradients at the weights themselves.",
        ),
        "after": (
            list(after),
            bool(after) and min(after) >= 0 and max(after) < MOST_STEPS,
            f"must name steps of training, at least 0 and fewer than {MOST_STEPS:,}",
            "0 is the initial weights.",
        ),
        "rows": (
            rows,
            rows >= max(8, 2 * config.k),
            "must be at least 8 and twice k",
            "128 is usual.",
        ),
        "slices": (
            slices,
            1 <= slices <= MOST_SLICES,
            f"must lie in [1, {MOST_SLICES}]",
            "1 is fastest.",
        ),
        "share": (share, 0 < share < 1, "must lie in (0, 1)", "The default is 0.5."),
        "chance": (chance, 0 < chance < 1, "must lie in (0, 1)", "The default is 0.05."),
    }
    for name, (value, holds, requirement, fix) in rules.items():
        if not holds:
            raise ConfigError(f"{name} {requirement}; got {value}. {fix}")


def probed(training: Training, rows: int, slices: int, tell: Tell = silent) -> Probe:
    """The probe of a training as it stands, on the micro-batches that would come next."""
    config = training.config
    objective = copy.deepcopy(training.objective)  # elr's moves with every loss
    places = [divmod(training.step * config.k + number, config.k) for number in range(rows)]
    taken = itertools.count(1)

    def counted_loss(step: int, i: int) -> Tensor:
        tell(f"probing at step {training.step:,}", next(taken), rows * slices)
        return loss(training, objective, step, i)

    losses = [partial(counted_loss, step, i) for step, i in places]
    return of_losses(training.model, losses, config.b, config.k, slices)


def loss(training: Training, objective: Any, step: int, i: int) -> Tensor:
    x, y = training.problem.micro_batch(step, i)
    with torch.autocast(
        training.device.type, torch.bfloat16, enabled=training.config.autocast == "bfloat16"
    ):
        found: Tensor = objective(training.model, x, y, training.problem.index(step, i), step, i)
    return found


def multiples(probe: Probe) -> list[int]:
    """How many rows to merge: as long as each half has two macro-batches left."""
    return [m for m in MULTIPLES if m == 1 or len(probe) // m >= 4 * probe.k]


# --- showing: functions of the lines -----------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]]) -> Table:
    result = Table(
        title="Micro-gradients: how far they agree, and the tau that follows",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "after",
        "b",
        "distance",
        "B/(b+B)",
        "B (95%)",
        "d_eff",
        "tau",
        "accepted",
        "steps",
    ):
        result.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        first = line["m"] == 1
        noise = (scale(line), shown(line["dimension"])) if first else ("", "")
        distances = f"{line['distance_mean']:.3f}", f"{line['distance_expected']:.3f}"
        accepted, steps = (
            f"{100 * line['predicted']:.0f}% ({100 * line['measured']:.0f}%)",
            f"{100 * line['measured_steps']:.0f}%",
        )
        result.add_row(
            f"{line['after']:,}" if first else "",
            str(line["b"]),
            *distances,
            *noise,
            f"{line['tau']:.3f}",
            accepted,
            steps,
        )
    k = lines[0]["k"]
    result.caption = (f"distance: mean of pairs, beside what B makes of it. tau: recommended. Of the {k - 1} compared micro-gradients of "
                      f"k = {k}: accepted as predicted from half of them (and as measured on the other half); steps taken, measured. "
                      "Where b is larger, measured micro-gradients were merged.")  # fmt: skip
    return result


def layer_table(line: dict[str, Any]) -> Table:
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
        result.add_row(
            part["name"], *distances, shown(part["noise_scale"]), shown(part["dimension"])
        )
    return result


def shown(value: float | None) -> str:
    return "∞" if value is None else number(value)


def scale(line: dict[str, Any]) -> str:
    return f"{shown(line['noise_scale'])} ({shown(line['noise_low'])}-{shown(line['noise_high'])})"


def verdicts(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """In words: each recommendation, its reason, and whether the measurement bears out the prediction."""
    for line in (line for line in lines if line["m"] == 1):
        gap = abs(line["predicted"] - line["measured"])
        holds = (
            "the prediction holds"
            if gap <= CLOSE
            else "the prediction does not hold: measure more with --rows"
        )
        gone = (
            f" {line['absent']} micro-gradients were zero, NaN or infinite, and left out."
            if line["absent"]
            else ""
        )
        yield (f"After {line['after']:,} steps: the estimate is tau = {line['tau']:.3f}. {line['reason']} Measured on "
               f"{others(line)} other micro-gradients: {100 * line['measured']:.1f}%, {100 * gap:.1f} points away; "
               f"{holds}.{gone}")  # fmt: skip


def recommendation(lines: Sequence[dict[str, Any]]) -> str:
    """One line: the tau to take, with n and its interval, from the state that was trained furthest; or why none can be told."""
    line = [line for line in lines if line["m"] == 1][-1]
    seen = (
        f"{line['rows']} micro-gradients of b = {line['b']} after {line['after']:,} steps, one seed"
    )
    why = doubt(line)
    if why:
        return f"No tau is recommended, from {seen}: {why}"
    (low, high), (least, most) = line["tau_interval"], line["measured_interval"]
    return (f"Recommended: --tau {line['tau']:.3f} (95% interval {low:.3f} to {high:.3f}), from {seen}. Of those compared it should accept "
            f"{100 * line['predicted']:.0f}%; of {others(line)} others it accepted {100 * line['measured']:.0f}% "
            f"({100 * least:.0f} to {100 * most:.0f}%). How accurate the training gets is not measured.")  # fmt: skip


def doubt(line: dict[str, Any]) -> str:
    """Why nothing can be recommended, and what to do; empty where something can."""
    if line["noise_scale"] is None or line["noise_high"] is None:
        low = (
            ""
            if line["noise_low"] is None
            else f" (B may be anything from {number(line['noise_low'])} samples up)"
        )
        return f"no common direction can be told from noise{low}. Raise --b or --rows, or look --after more steps."
    if line["tau_interval"] is None:
        return f"they are too few for an interval. Raise --rows to {max(4 * PARTS, 4 * line['k'])} or more."
    (low, high), (least, most) = line["tau_interval"], line["measured_interval"]
    if high - low > WIDE:
        return f"it may lie anywhere from {low:.2f} to {high:.2f}. Raise --rows."
    if not least - CLOSE <= line["predicted"] <= most + CLOSE:
        return (f"of {others(line)} others tau = {line['tau']:.3f} accepted {100 * least:.0f} to {100 * most:.0f}%, and "
                f"{100 * line['predicted']:.0f}% were predicted. Raise --rows.")  # fmt: skip
    return ""


def others(line: dict[str, Any]) -> int:
    """Micro-gradients that nothing was predicted from."""
    return int(line["rows"]) - int(line["rows"]) // 2


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """One row of panels for each number of steps: distances, acceptance against tau, distances by layer. A PNG of 150 dpi."""
    states = list(dict.fromkeys(line["after"] for line in lines))
    height = max(3.3, 1.2 + 0.17 * max(len(line["layers"]) for line in lines))
    figure = canvas(12.5, height * len(states))
    axes = figure.subplots(len(states), 3, squeeze=False, width_ratios=(1, 1.15, 1))
    total = height * len(states)
    figure.subplots_adjust(
        left=0.03,
        right=0.985,
        top=1 - 0.62 / total,
        bottom=0.6 / total,
        wspace=0.28,
        hspace=1.15 / (height - 1.15),
    )
    for row, after in zip(axes, states, strict=True):
        group = [line for line in lines if line["after"] == after]
        histogram(row[0], group)
        curves(row[1], group)
        by_layer(row[2], group[0])
    with records.whole(path) as part:
        figure.savefig(part, dpi=DPI)


def when(line: dict[str, Any]) -> str:
    return "initial weights" if not line["after"] else f"after {line['after']:,} steps"


def histogram(ax: "Axes", group: Sequence[dict[str, Any]]) -> None:
    """Cosine distances of pairs, at b and its largest multiple."""
    highest = 0.0
    for line in {line["m"]: line for line in (group[0], group[-1])}.values():
        share = [100 * count / sum(line["bins"]) for count in line["bins"]]
        edges = [2 * i / BINS for i in range(BINS + 1)]
        ax.stairs(
            share, edges, fill=True, alpha=0.35, color=SHADES[line["m"]], label=f"b = {line['b']}"
        )
        ax.axvline(
            line["distance_expected"],
            color=SHADES[line["m"]],
            linewidth=1.4,
            linestyle=(0, (1, 1.5)),
        )
        highest = max(highest, *share)
    plain(ax)
    ax.set(xlim=(0, 1.3), ylim=(0, 1.25 * highest))
    ax.set_title(
        f"{when(group[0])}: pairs of micro-gradients (%)", loc="left", fontsize=11, color=INK, pad=8
    )
    ax.set_xlabel("cosine distance (dotted: B / (b + B))", fontsize=10, color=SOFT)
    ax.legend(
        frameon=False,
        fontsize=9.5,
        labelcolor=SOFT,
        loc="upper left" if group[-1]["distance_expected"] > 0.6 else "upper right",
    )


def curves(ax: "Axes", group: Sequence[dict[str, Any]]) -> None:
    """Acceptance against tau: lines are predicted from the first half of the rows at b, dots measured on the second."""
    for line in group:
        taus, predicted, measured, _ = (list(values) for values in zip(*line["curve"], strict=True))
        ax.plot(
            taus,
            [100 * p for p in predicted],
            color=SHADES[line["m"]],
            linewidth=1.8,
            label=f"b = {line['b']}",
        )
        dots: dict[str, Any] = {
            "color": SHADES[line["m"]],
            "markersize": 3.4,
            "markeredgecolor": "white",
            "markeredgewidth": 0.3,
        }
        ax.plot(taus, [100 * a for a in measured], "o", **dots)
    plain(ax)
    tau = group[0]["tau"]
    ax.axvline(tau, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    ax.set(xlim=(TAUS[0], TAUS[-1]), ylim=(0, 103))
    ax.set_title("accepted (%)", loc="left", fontsize=11, color=INK, pad=8)
    ax.set_title(f"dashed: the estimate, τ = {tau:.3f}", loc="right", fontsize=9, color=SOFT, pad=8)
    ax.set_xlabel("τ (lines: predicted from b, B, d_eff; dots: measured)", fontsize=10, color=SOFT)
    ax.legend(frameon=False, fontsize=9.5, labelcolor=SOFT, loc="lower right")


def by_layer(ax: "Axes", line: dict[str, Any]) -> None:
    """10%, 50% and 90% of the distances in each layer, the first on top."""
    parts = [part for part in line["layers"] if part["distance"][1] is not None]
    for i, part in enumerate(parts):
        low, middle, high = part["distance"]
        ax.plot(
            [low, high], [i, i], color=SHADES[1], linewidth=2, alpha=0.45, solid_capstyle="round"
        )
        ax.plot([middle], [i], "o", color=SHADES[1], markersize=5)
    low, middle, high = line["distance"]
    ax.axvspan(low, high, color=INK, alpha=0.06, linewidth=0)
    ax.axvline(middle, color=INK, linewidth=1)
    plain(ax)
    ax.grid(visible=False, axis="y")
    ax.set_ylim(len(parts) - 0.4, -0.6)
    ax.set_yticks(range(len(parts)), [part["name"] for part in parts], fontsize=9)
    ax.set_title(f"by layer, b = {line['b']}", loc="left", fontsize=11, color=INK, pad=8)
    ax.set_title("10%, 50%, 90%; grey: all", loc="right", fontsize=9, color=SOFT, pad=8)
    ax.set_xlabel("cosine distance", fontsize=10, color=SOFT)
