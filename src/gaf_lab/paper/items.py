"""Every figure and table of the paper as a plan of runs, at three scales, with the controls that the paper lacks.

`full` is the paper's setting (presets; `reading` says whose: the paper's text or its released code). `small` fits two CPU
cores in about two hours and is chosen so that the effect, or its absence, can show. `smoke` takes seconds and shows that
everything runs.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gaf_lab.settings import presets
from gaf_lab.settings.checks import MOST_SEEDS, ConfigError, check_count, nearest
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.fields import PolicyName
from gaf_lab.settings.plan import follow

Scale = Literal["smoke", "small", "full"]
Reading = Literal["paper", "code"]
Configs = list[TrainConfig]

NOISE = (0.0, 0.05, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
HUMAN = "100N-Fine"
TABLE: dict[str, dict[float | str, float]] = {  # the paper's table 1: validation accuracy
    "GAF": dict(
        zip(
            (*NOISE, HUMAN),
            (0.63, 0.61, 0.60, 0.58, 0.54, 0.53, 0.48, 0.39, 0.13, 0.614),
            strict=True,
        )
    ),
    "averaging": dict(
        zip(
            (*NOISE, HUMAN),
            (0.62, 0.58, 0.53, 0.50, 0.40, 0.38, 0.33, 0.20, 0.11, 0.521),
            strict=True,
        )
    ),
}
# the paper's grid, and 1.0, which it calls best on clean labels
TAUS = (0.95, 0.97, 0.99, 1.0, 1.01, 1.03, 1.05)
# micro-batch sizes; the paper's list was lost, the authors' working repository swept these
SIZES = (100, 200, 400, 800)


@dataclass(frozen=True)
class Item:
    """A figure or table of the paper.

    Attributes:
        kind: curves over training, values against a field of the config, a table of them, or a picture in the plane.
        x: that field; the human labels of CIFAR-100N stand beside noise rates as a column of their own.
        keys: which numbers of the evaluations are shown.
        paper: what the paper prints, by arm and x, for curves by arm and key; accuracies in [0, 1].
    """

    id: str
    title: str
    claim: str
    kind: Literal["curves", "against", "table", "plane"]
    x: str | None
    keys: tuple[str, ...]
    paper: dict[str, dict[float | str, float]]


FIGURE6 = {arm: {x: value for x, value in row.items() if x != HUMAN} for arm, row in TABLE.items()}
FIGURE9: dict[str, dict[float | str, float]] = {"GAF": {100: 0.614}, "averaging": {100: 0.521}}

ITEMS = {
    item.id: item
    for item in (
        Item("fig1", "Accuracy and cosine distance over training",
             "Micro-gradients are close to orthogonal or beyond, above all early and late in training.",
             "curves", None, ("test_accuracy", "distance_mean"), {}),
        Item("fig2", "The idea in two dimensions", "Micro-gradients that disagree are left out of the average.", "plane", None, (), {}),
        Item("fig3", "Cosine distance, ViT-L/16 on ImageNet", "Large models on large data show the same distances, near 1 early and late.",
             "curves", None, ("distance_mean",), {}),
        Item("fig4", "Cosine distance against micro-batch size", "Micro-gradients agree more as the micro-batch grows.",
             "against", "b", ("distance_mean",), {}),
        Item("fig5", "Cosine distance on white noise", "On white noise the distance never falls below 0.99 after a few iterations.",
             "curves", None, ("distance_mean", "clean_accuracy"), {"averaging": {"distance_mean": 0.99}}),
        Item("fig6", "Accuracy per noise level", "GAF gains at every noise level, most at 60%.",
             "against", "noise_rate", ("test_accuracy",), FIGURE6),
        Item("fig7", "Accuracy against tau", "0.97 is best under noise; above it the gain goes away.",
             "against", "tau", ("test_accuracy",), {}),
        Item("fig8", "CIFAR-100N-Fine: training and validation",
             "Averaging reaches 100% training accuracy by 150,000 iterations, GAF stays near 60% at 600,000.",
             "curves", None, ("test_accuracy", "clean_accuracy", "memorised"),
             {"GAF": {"test_accuracy": 0.614}, "averaging": {"test_accuracy": 0.521}}),
        Item("fig9", "Accuracy against micro-batch size", "GAF's gain shrinks as the micro-batch grows; averaging is best at 200.",
             "against", "b", ("test_accuracy",), FIGURE9),
        Item("table1", "Accuracy at every label error", "GAF beats averaging in all ten columns, by up to 19 points.",
             "table", "noise_rate", ("test_accuracy",), TABLE),
    )
}  # fmt: skip


def item(name: str) -> Item:
    if name not in ITEMS:
        raise ConfigError(
            f"paper: the figure must be one of {', '.join(ITEMS)}; got {name!r}.{nearest(name, ITEMS)}"
        )
    return ITEMS[name]


def plan(
    name: str, scale: Scale = "smoke", reading: Reading = "paper", seeds: int | None = None
) -> Configs:
    """The runs behind a figure: every arm at every point, for paired seeds from 0 on. Empty for fig2, which needs no run.

    Args:
        name: as in ITEMS.
        scale: how long it may take.
        reading: whose setting `full` and `smoke` are, the paper's text or its released code.
        seeds: None takes the scale's own number.

    Raises:
        ConfigError: for an unknown figure, or seeds below 1.
    """
    item(name)
    if seeds is not None:
        check_count("seeds", seeds, 1, MOST_SEEDS, "Three is the least that tells a difference.")
    points, arms = (small if scale == "small" else partial(full, reading=reading))(name)
    configs = [
        config
        for seed in range(seeds or SEEDS.get((scale, name), 1 if scale == "smoke" else 3))
        for point in points
        for config in arms(
            dataclasses.replace(reduced(point) if scale == "smoke" else point, seed=seed)
        )
    ]
    return list({config.hash: config for config in configs}.values())


# where it is not one for smoke and three for the others
SEEDS = {("small", "fig1"): 1, ("full", "fig3"): 1}

Arms = Callable[[TrainConfig], Configs]  # from GAF's config at a point to those of every arm there


# --- arms --------------------------------------------------------------------------------------------------------


def averaging(gaf: TrainConfig) -> TrainConfig:
    return dataclasses.replace(gaf, policy="mean", average="mean", label="")


def baseline_of_the_code(gaf: TrainConfig) -> TrainConfig:
    """The released scripts' baseline: a loop of its own over batches of 128."""
    return dataclasses.replace(averaging(gaf), k=1, b=128, sampler="iid")


def as_averaging(gaf: TrainConfig) -> Configs:
    return [dataclasses.replace(averaging(gaf), label="averaging")]


def pair(gaf: TrainConfig) -> Configs:
    return [averaging(gaf), gaf]


def controlled(gaf: TrainConfig) -> Configs:
    """Averaging, GAF, and what tells agreement from fewer steps and from smaller batches.

    With k = 2 GAF takes both rows or none, and a random subset of as many rows is the replay skip.
    """
    last: PolicyName = "replay-skip" if gaf.k == 2 else "random-subset"
    policies: tuple[PolicyName, ...] = ("random-skip", last)
    return [
        *pair(gaf),
        *(
            follow(dataclasses.replace(averaging(gaf), policy=policy, replay=HERE), gaf)
            for policy in policies
        ),
    ]


HERE = Path("here")  # until `follow` names the run


def every_arm(gaf: TrainConfig) -> Configs:
    """GAF and its variants, the controls, and what a user would otherwise pick; see docs/controls.md for the sources."""

    def variant(**changes: Any) -> TrainConfig:
        return dataclasses.replace(gaf, **changes)

    def rival(**changes: Any) -> TrainConfig:
        return dataclasses.replace(averaging(gaf), **changes)

    macro = gaf.k * gaf.b
    replaying = ("random-skip", "replay-skip", "random-subset", "scaled-lr")
    return [
        *pair(gaf),
        *(follow(rival(policy=policy, replay=HERE), gaf) for policy in replaying),
        variant(start="best"),
        variant(start="worst"),
        variant(average="halving"),
        variant(scope="group"),
        *(variant(k=k, b=macro // k, label=f"GAF, k = {k}") for k in (2, 4, 8) if k != gaf.k),
        variant(optimizer="adamw", lr=ADAMW),
        rival(optimizer="adamw", lr=ADAMW),
        rival(early_stopping=4),
        rival(ema=0.99),
        rival(label_smoothing=0.1),
        rival(loss="gce"),
        rival(loss="elr"),
        rival(mixup=1.0),
        rival(sam=0.05),
        rival(b=4 * gaf.b, label="larger batch"),
    ]


ADAMW = 1e-3  # its usual learning rate


# --- the paper's settings ----------------------------------------------------------------------------------------


def full(name: str, reading: Reading = "paper") -> tuple[Configs, Arms]:
    """GAF's config at every point of a figure, and the arms there."""
    code = reading == "code"
    clean = dataclasses.replace(
        presets.CIFAR100_GAF_CODE if code else presets.CIFAR100_GAF, noise_rate=0.0, tau=1.0
    )
    clean = dataclasses.replace(clean, label="GAF")
    human = dataclasses.replace(
        presets.CIFAR100N_GAF_CODE if code else presets.CIFAR100N_GAF, label="GAF"
    )
    noisy = [
        clean,
        *(
            dataclasses.replace(clean, noise_rate=rate, tau=clean.tau if code else 0.97)
            for rate in NOISE[1:]
        ),
    ]
    both: Arms = (lambda gaf: [baseline_of_the_code(gaf), gaf]) if code else controlled
    alone: Arms = lambda gaf: [averaging(gaf)]  # noqa: E731
    white = dataclasses.replace(presets.NOISE_MEAN, passes=100.0, eval_every=1.0)
    at_40 = dataclasses.replace(noisy[5], passes=2000.0)
    return {
        "fig1": ([clean, human], both),
        "fig2": ([], both),
        "fig3": ([IMAGENET], as_averaging),
        "fig4": (
            of_equal_steps(clean, (*SIZES, 1600), steps=5000, pictures=50_000, evaluations=20),
            alone,
        ),
        "fig5": ([white], alone),
        "fig6": (noisy, both),
        "fig7": ([dataclasses.replace(at_40, tau=tau) for tau in (*TAUS, 2.0)], across_tau),
        "fig8": ([dataclasses.replace(human, passes=2400.0)], both),
        "fig9": (
            [*(dataclasses.replace(human, b=b) for b in SIZES), largest(human)],
            across_size(both),
        ),
        "table1": ([*noisy, human], both),
    }[name]


def of_equal_steps(
    gaf: TrainConfig, sizes: tuple[int, ...], steps: int, pictures: int, evaluations: int
) -> Configs:
    """A config at each micro-batch size, as many steps for each: the distance also changes as training goes on."""
    passes = {b: steps * gaf.k * b / pictures for b in sizes}
    return [
        dataclasses.replace(gaf, b=b, passes=passes[b], eval_every=passes[b] / evaluations)
        for b in sizes
    ]


# The paper gives neither optimizer nor batch for ViT-L/16; these are usual for training it from nothing (arXiv 2010.11929, table 3).
IMAGENET = TrainConfig(
    dataset="imagenet", noise="none", noise_rate=0.0, heldout=0.0, augment=True, model="vit-l16", size=224, k=2, b=100, passes=30.0,
    eval_every=0.1, optimizer="adamw", lr=3e-4, weight_decay=0.3, schedule="cosine", autocast="bfloat16", policy="gaf", tau=0.97,
)  # fmt: skip


def largest(gaf: TrainConfig) -> TrainConfig:
    """The largest batch of the paper's text, for averaging only: in one piece."""
    return dataclasses.replace(gaf, k=1, b=1100)


def across_tau(gaf: TrainConfig) -> Configs:
    """GAF; at tau = 2, which accepts everything, averaging."""
    return [averaging(gaf) if gaf.tau == 2 else gaf]


def across_size(arms: Arms) -> Arms:
    return lambda gaf: [averaging(gaf)] if gaf.k == 1 else arms(gaf)


# --- two cores, two hours ----------------------------------------------------------------------------------------

# A tenth of Fashion-MNIST, which a small network memorises within minutes. tau = 0.8 is what the demo's task, of the same
# k and b, was fixed to beforehand; it was not chosen here.
FASHION = TrainConfig(
    dataset="fashion-mnist",
    limit=5000,
    model="mlp",
    k=8,
    b=20,
    tau=0.8,
    lr=0.05,
    momentum=0.9,
    passes=30.0,
    eval_every=1.5,
)
# The paper's ResNet18 on the real pictures, for as long as a CPU allows.
EARLY = dataclasses.replace(
    presets.CIFAR100_GAF,
    noise="none",
    noise_rate=0.0,
    schedule="constant",
    passes=1.0,
    eval_every=0.2,
    probe=500,
)


def small(name: str) -> tuple[Configs, Arms]:
    """GAF's config at every point of a figure, and the arms there."""
    alone: Arms = lambda gaf: [averaging(gaf)]  # noqa: E731
    early = dataclasses.replace(EARLY, limit=5000, heldout=0.1, sampler="iid")
    noisy = [dataclasses.replace(FASHION, noise_rate=rate) for rate in NOISE]
    human = dataclasses.replace(early, dataset="cifar100n", noise="human")
    grid = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 2.0)
    vit = dataclasses.replace(
        IMAGENET,
        model="vit-tiny",
        size=32,
        b=50,
        limit=2000,
        passes=20.0,
        eval_every=0.5,
        autocast="none",
    )
    white = dataclasses.replace(
        EARLY,
        dataset="noise",
        augment=False,
        sampler="iid",
        limit=1000,
        passes=50.0,
        eval_every=2.5,
    )
    return {
        "fig1": ([EARLY, dataclasses.replace(EARLY, dataset="cifar100n", noise="human")], pair),
        "fig2": ([], pair),
        "fig3": ([vit], as_averaging),
        "fig4": (
            of_equal_steps(early, (25, 50, 100, 200, 400), steps=40, pictures=4500, evaluations=2),
            alone,
        ),
        "fig5": ([white], alone),
        "fig6": (noisy, controlled),
        "fig7": ([dataclasses.replace(FASHION, tau=tau) for tau in grid], across_tau),
        "fig8": ([dataclasses.replace(human, augment=False, passes=30.0, eval_every=1.5)], pair),
        "fig9": ([dataclasses.replace(FASHION, b=b) for b in (5, 10, 20, 40, 80)], controlled),
        "table1": ([noisy[0], noisy[5], noisy[7]], every_arm),
    }[name]


# --- seconds -----------------------------------------------------------------------------------------------------

SMOKE = 400  # pictures


def reduced(config: TrainConfig) -> TrainConfig:
    """The paper's config on fewer pictures, for a handful of steps, with a fifth of the micro-batch and the smaller network."""
    imagenet = config.dataset == "imagenet"
    b = max(config.b // 5, 1)
    steps = 4 * config.k * b / SMOKE
    return dataclasses.replace(
        config, limit=SMOKE, b=b, passes=steps, eval_every=steps / 2, probe=100, sampler="iid", schedule="constant", autocast="none",
        model="vit-tiny" if imagenet else "resnet18", stem="imagenet", size=32 if imagenet else config.size,
    )  # fmt: skip
