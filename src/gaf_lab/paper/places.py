"""Positions of runs on the x of a figure, and the arms and differences at each of them."""

import math
from collections.abc import Callable, Iterable

from gaf_lab.paper.items import HUMAN_COLUMN, Item
from gaf_lab.records.run import Run
from gaf_lab.report.arms import BASELINE, Arm, gaf_of, group_by_arm, is_gaf
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Difference, paired_difference

# a value of the item's x, HUMAN_COLUMN, or the network and data of a panel
Position = float | str
NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cifar100n": "CIFAR-100N-Fine",
    "cifar100n-coarse": "CIFAR-100N-Coarse",
    "mnist5k": "MNIST-5k",
    "fashion-mnist": "Fashion-MNIST",
    "noise": "white noise",
    "imagenet": "ImageNet",
    "digits": "digits",
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "preact-resnet34": "PreAct ResNet34",
    "vit-l16": "ViT-L/16",
    "vit-tiny": "a small ViT",
    "mlp": "MLP",
    "convnet": "a small convolutional network",
}


def position_of(item: Item, run: Run) -> Position:
    """The run's value of the item's x; over training, the network and data of its panel."""
    config = run.header["config"]
    if item.x is None:
        model, data = config["model"], config["dataset"]
        return f"{NAMES.get(model, model)} on {NAMES.get(data, data)}"
    if item.x == "noise_rate" and config["dataset"] == "cifar100n":
        return HUMAN_COLUMN
    if item.x == "noise_rate" and config["noise"] == "none":
        return 0.0
    return float(config[item.x])


def sort_positions(positions: Iterable[Position]) -> list[Position]:
    """Each once: numbers, rising, then words in the order given."""
    once = dict.fromkeys(positions)
    numbers = [x for x in once if not isinstance(x, str)]
    return [*sorted(numbers), *(x for x in once if isinstance(x, str))]


def paper_positions(item: Item) -> list[Position]:
    """The positions at which the paper prints a value."""
    return [x for row in item.paper.values() for x in row]


def arms_by_position(item: Item, runs: list[Run]) -> dict[Position, list[Arm]]:
    """The arms at each position, in order."""
    groups: dict[Position, list[Run]] = {}
    for run in runs:
        groups.setdefault(position_of(item, run), []).append(run)
    return {x: group_by_arm(groups[x]) for x in sort_positions(groups)}


def comparable_arms(item: Item, groups: dict[Position, list[Arm]], x: Position) -> list[Arm]:
    """The arms at a position, and those of other positions that are independent of x."""
    found = list(groups[x])
    for other, arms in groups.items():
        if other != x:
            found += [arm for arm in arms if independent_of_x(item, arm)]
    return found


def independent_of_x(item: Item, arm: Arm) -> bool:
    """Whether the arm is independent of the item's x (averaging has no tau)."""
    return item.x == "tau" and arm.config["policy"] == "mean"


def arm_names(item: Item, runs: list[Run]) -> list[str]:
    """The arms in the order of their runs; without runs, those of the paper."""
    if not runs:
        return list(item.paper)
    arms = [arm for group in arms_by_position(item, runs).values() for arm in group]
    names = {id(run): arm.name for arm in arms for run in arm.runs}
    return list(dict.fromkeys(names[id(run)] for run in runs))


def paper_value(item: Item, arm: str, x: Position, key: str) -> float | None:
    """The value that the paper prints; None if there is none."""
    row = item.paper.get(arm, {})
    if item.x is None:  # over training, by key
        return row.get(key)
    return row.get(x) if key == item.keys[0] else None


def gaf_pairs(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """GAF with each arm of another policy, averaging first; then each variant of GAF with GAF."""
    gaf = gaf_of(arms)
    if gaf is None:
        return []
    others = [arm for arm in arms if not is_gaf(arm)]
    others.sort(key=lambda arm: arm.name != BASELINE)
    variants = [arm for arm in arms if is_gaf(arm) and arm is not gaf]
    return [*((gaf, arm) for arm in others), *((arm, gaf) for arm in variants)]


def differences_by_position(
    item: Item, runs: list[Run], measure: Measure
) -> list[tuple[Position, Difference]]:
    """The paired differences at each position, between arms of which at least one stands there."""
    groups = arms_by_position(item, runs)
    found = []
    for x, arms in groups.items():
        for one, other in gaf_pairs(comparable_arms(item, groups, x)):
            if one in arms or other in arms:
                gap = paired_difference(one, other, measure)
                found += [] if gap is None else [(x, gap)]
    return found


def position_in_words(item: Item, x: Position) -> str:
    """ "40%", "τ = 0.97", "b = 100"."""
    if isinstance(x, str):
        return x
    return {"noise_rate": f"{100 * x:g}%", "tau": f"τ = {x:g}", "b": f"b = {x:g}"}[item.x or ""]


def tick_texts(item: Item, positions: Iterable[Position]) -> list[str]:
    return [tick_text(item, x) for x in positions]


def tick_text(item: Item, x: Position) -> str:
    if isinstance(x, str):
        return x
    return f"{100 * x:g}" if item.x == "noise_rate" else f"{x:g}"


def axis_positions(item: Item, runs: list[Run]) -> dict[Position, float]:
    """Each position's coordinate on the axis.

    Noise stands at its share in %, b at its logarithm, taus are evenly spaced; words follow at
    the end.
    """
    positions = sort_positions([*arms_by_position(item, runs), *paper_positions(item)])
    numbers = [x for x in positions if not isinstance(x, str)]
    scales: dict[str, Callable[[float], float]] = {
        "noise_rate": lambda x: 100 * x,
        "tau": numbers.index,
        "b": math.log2,
    }
    scale = scales[item.x or ""]
    found: dict[Position, float] = {x: float(scale(x)) for x in numbers}
    ends = [*found.values()] or [0.0]
    step = (max(ends) - min(ends)) / max(1, len(found) - 1) if found else 1.0
    words = [x for x in positions if isinstance(x, str)]
    return found | {x: max(ends) + step * i for i, x in enumerate(words, 1)}
