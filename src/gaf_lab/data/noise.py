"""Wrong labels: which of the training labels are replaced, and by what. Each returns the new labels and where they differ.

At one seed a lower rate flips a subset of what a higher one flips, to the same labels: noise levels are paired.
"""

import torch
from torch import Tensor

from gaf_lab.data.sampling import generator


def symmetric(y: Tensor, rate: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Exactly int(rate * N) labels, drawn without replacement, become one of the other classes, each equally likely.

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
    """Exactly int(rate * N) labels, drawn without replacement, become the next class, the last one the first.

    Args:
        y: clean labels (N,) int64 in [0, classes).
        rate: share to flip, in [0, 1).
        classes: at least 2.
        seed: the same seed, the same flips.
        coarse: super-class of each class (classes,); then it is the next class within the same super-class.

    Returns:
        noisy labels (N,), flipped (N,) bool: where they differ from y.
    """
    _check(y, rate, classes)
    chosen = torch.randperm(len(y), generator=generator(seed, "asymmetric noise"))[
        : int(rate * len(y))
    ]
    return _replace(y, chosen, successors(classes, coarse)[y])


def successors(classes: int, coarse: Tensor | None = None) -> Tensor:
    """The class that each class is mistaken for (classes,): the next, within its super-class if there are such."""
    after = (torch.arange(classes) + 1) % classes
    if coarse is None:
        return after
    if len(coarse) != classes:
        raise ValueError(f"noise: coarse must give a super-class for each of the {classes} classes; got {len(coarse)}. "
                         "Leave it out for data without super-classes.")  # fmt: skip
    for group in sorted(set(coarse.tolist())):
        members = (coarse == group).nonzero().flatten()
        if len(members) == 1:
            raise ValueError(f"noise: each super-class must have two classes or more; super-class {group} has one, {members.item()}, "
                             "which has no other to be mistaken for. Leave coarse out.")  # fmt: skip
        after[members] = members.roll(-1)
    return after


def human(y: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The labels that people gave.

    Args:
        y: clean labels (N,) int64.
        labels: `DataSet.human` (N,) int64, or None where the data set has none.

    Returns:
        noisy labels (N,), flipped (N,) bool: where they differ from y.
    """
    if labels is None:
        raise ValueError(
            "noise: human labels must come with the data set; got one without. Use cifar100n or cifar100n-coarse."
        )
    if labels.shape != y.shape:
        raise ValueError(
            f"noise: there must be one human label per sample, {len(y)}; got {len(labels)}. Pass the whole training set."
        )
    return labels, labels != y


def _replace(y: Tensor, chosen: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    noisy = y.clone()
    noisy[chosen] = wrong[chosen]
    return noisy, noisy != y


def _check(y: Tensor, rate: float, classes: int) -> None:
    if not 0 <= rate < 1:
        raise ValueError(
            f"noise: rate must lie in [0, 1); got {rate}. It is the share of labels that are flipped."
        )
    if classes < 2:
        raise ValueError(
            f"noise: there must be two classes or more to flip between; got {classes}."
        )
    if ((y < 0) | (y >= classes)).any():
        raise ValueError(
            f"noise: labels must lie in [0, {classes}); got {int(y.min())} to {int(y.max())}. Is `classes` right?"
        )
