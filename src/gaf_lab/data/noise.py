"""Label noise: which training labels are replaced, and by which others.

Each function returns the new labels and where they differ. Noise levels are paired: with the same
seed, a lower rate flips a subset of the labels that a higher rate flips, to the same classes.
"""

import torch
from torch import Tensor

from gaf_lab.data.sampling import generator


def symmetric(y: Tensor, rate: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Exactly int(rate * N) labels, drawn without replacement, become another class.

    All other classes are equally likely.

    Args:
        y: clean labels (N,) int64 in [0, classes).
        rate: share to flip, in [0, 1).
        classes: at least 2.
        seed: the same seed, the same flips.

    Returns:
        noisy labels (N,), flipped (N,) bool: where they differ from y.
    """
    _check(y, rate, classes)
    draw = generator(seed, "symmetric noise")
    chosen = torch.randperm(len(y), generator=draw)[: int(rate * len(y))]
    shift = torch.randint(1, classes, (len(y),), generator=draw)
    return _replace(y, chosen, (y + shift) % classes)


def asymmetric(
    y: Tensor, rate: float, classes: int, seed: int, coarse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exactly int(rate * N) labels, drawn without replacement, become the next class.

    The last class becomes the first.

    Args:
        y: clean labels (N,) int64 in [0, classes).
        rate: share to flip, in [0, 1).
        classes: at least 2.
        seed: the same seed, the same flips.
        coarse: super-class of each class (classes,). With it, labels become the next class within
            the same super-class.

    Returns:
        noisy labels (N,), flipped (N,) bool: where they differ from y.
    """
    _check(y, rate, classes)
    draw = generator(seed, "asymmetric noise")
    chosen = torch.randperm(len(y), generator=draw)[: int(rate * len(y))]
    return _replace(y, chosen, successors(classes, coarse)[y])


def successors(classes: int, coarse: Tensor | None = None) -> Tensor:
    """The class that each class is mistaken for (classes,): the next one.

    coarse: with it, the next one within the super-class.
    """
    after = (torch.arange(classes) + 1) % classes
    if coarse is None:
        return after
    if len(coarse) != classes:
        raise ValueError(
            f"noise: coarse must give a super-class for each of the {classes} classes; "
            f"got {len(coarse)}. Leave it out for data without super-classes."
        )
    for group in sorted(set(coarse.tolist())):
        members = (coarse == group).nonzero().flatten()
        if len(members) == 1:
            raise ValueError(
                "noise: each super-class must have two classes or more; "
                f"super-class {group} has one, {members.item()}, "
                "which has no other to be mistaken for. Leave coarse out."
            )
        after[members] = members.roll(-1)
    return after


def human(y: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The labels given by people.

    Args:
        y: clean labels (N,) int64.
        labels: `DataSet.human` (N,) int64, or None if the data set has none.

    Returns:
        noisy labels (N,), flipped (N,) bool: where they differ from y.
    """
    if labels is None:
        raise ValueError(
            "noise: human labels must come with the data set; got one without. "
            "Use cifar100n or cifar100n-coarse."
        )
    if labels.shape != y.shape:
        raise ValueError(
            f"noise: there must be one human label per sample, {len(y)}; got {len(labels)}. "
            "Pass the whole training set."
        )
    return labels, labels != y


def _replace(y: Tensor, chosen: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    noisy = y.clone()
    noisy[chosen] = wrong[chosen]
    return noisy, noisy != y


def _check(y: Tensor, rate: float, classes: int) -> None:
    if not 0 <= rate < 1:
        raise ValueError(
            f"noise: rate must lie in [0, 1); got {rate}. "
            "It is the share of labels that are flipped."
        )
    if classes < 2:
        raise ValueError(
            f"noise: there must be two classes or more to flip between; got {classes}."
        )
    if ((y < 0) | (y >= classes)).any():
        raise ValueError(
            f"noise: labels must lie in [0, {classes}); "
            f"got {int(y.min())} to {int(y.max())}. Is `classes` right?"
        )
