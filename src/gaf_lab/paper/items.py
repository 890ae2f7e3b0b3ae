"""The paper's figures and tables: what each shows, claims, and prints."""

from dataclasses import dataclass
from typing import Literal

from gaf_lab.settings.checks import ConfigError, nearest

NOISE_RATES = (0.0, 0.05, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
HUMAN_COLUMN = "100N-Fine"
TABLE1_COLUMNS = (*NOISE_RATES, HUMAN_COLUMN)
PaperValues = dict[str, dict[float | str, float]]  # what the paper prints, by arm and x

# table 1: validation accuracy
GAF_ROW = (0.63, 0.61, 0.60, 0.58, 0.54, 0.53, 0.48, 0.39, 0.13, 0.614)
AVERAGING_ROW = (0.62, 0.58, 0.53, 0.50, 0.40, 0.38, 0.33, 0.20, 0.11, 0.521)
TABLE1: PaperValues = {
    "GAF": dict(zip(TABLE1_COLUMNS, GAF_ROW, strict=True)),
    "averaging": dict(zip(TABLE1_COLUMNS, AVERAGING_ROW, strict=True)),
}
FIGURE6: PaperValues = {
    arm: {x: value for x, value in row.items() if x != HUMAN_COLUMN} for arm, row in TABLE1.items()
}
FIGURE9: PaperValues = {"GAF": {100: 0.614}, "averaging": {100: 0.521}}


@dataclass(frozen=True)
class Item:
    """A figure or table of the paper.

    Attributes:
        kind: curves over training, values against a field of the config, a table of such values, or
            a picture in the plane.
        x: that field. The human labels of CIFAR-100N are a column beside the noise rates.
        keys: the numbers of the evaluations that are shown.
        paper: what the paper prints, by arm and x, for curves by arm and key; accuracies in [0, 1].
    """

    id: str
    title: str
    claim: str
    kind: Literal["curves", "against", "table", "plane"]
    x: str | None
    keys: tuple[str, ...]
    paper: PaperValues


ITEM_LIST = (
    Item(
        "fig1",
        "Accuracy and cosine distance over training",
        "Micro-gradients are close to orthogonal or beyond, above all early and late in training.",
        "curves",
        None,
        ("test_accuracy", "distance_mean"),
        {},
    ),
    Item(
        "fig2",
        "The idea in two dimensions",
        "Micro-gradients that disagree are left out of the average.",
        "plane",
        None,
        (),
        {},
    ),
    Item(
        "fig3",
        "Cosine distance, ViT-L/16 on ImageNet",
        "Large models on large data show the same distances, near 1 early and late.",
        "curves",
        None,
        ("distance_mean",),
        {},
    ),
    Item(
        "fig4",
        "Cosine distance against micro-batch size",
        "Micro-gradients agree more as the micro-batch grows.",
        "against",
        "b",
        ("distance_mean",),
        {},
    ),
    Item(
        "fig5",
        "Cosine distance on white noise",
        "On white noise the distance never falls below 0.99 after a few iterations.",
        "curves",
        None,
        ("distance_mean", "clean_accuracy"),
        {"averaging": {"distance_mean": 0.99}},
    ),
    Item(
        "fig6",
        "Accuracy per noise level",
        "GAF gains at every noise level, most at 60%.",
        "against",
        "noise_rate",
        ("test_accuracy",),
        FIGURE6,
    ),
    Item(
        "fig7",
        "Accuracy against tau",
        "0.97 is best under noise; above it the gain goes away.",
        "against",
        "tau",
        ("test_accuracy",),
        {},
    ),
    Item(
        "fig8",
        "CIFAR-100N-Fine: training and validation",
        "Averaging reaches 100% training accuracy by 150,000 iterations, "
        "GAF stays near 60% at 600,000.",
        "curves",
        None,
        ("test_accuracy", "clean_accuracy", "memorised"),
        {"GAF": {"test_accuracy": 0.614}, "averaging": {"test_accuracy": 0.521}},
    ),
    Item(
        "fig9",
        "Accuracy against micro-batch size",
        "GAF's gain shrinks as the micro-batch grows; averaging is best at 200.",
        "against",
        "b",
        ("test_accuracy",),
        FIGURE9,
    ),
    Item(
        "table1",
        "Accuracy at every label error",
        "GAF beats averaging in all ten columns, by up to 19 points.",
        "table",
        "noise_rate",
        ("test_accuracy",),
        TABLE1,
    ),
)
ITEMS = {item.id: item for item in ITEM_LIST}


def find_item(name: str) -> Item:
    if name not in ITEMS:
        raise ConfigError(
            f"paper: the figure must be one of {', '.join(ITEMS)}; got {name!r}."
            f"{nearest(name, ITEMS)}"
        )
    return ITEMS[name]
