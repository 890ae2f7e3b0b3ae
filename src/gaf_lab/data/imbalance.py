"""A long tail: classes of different sizes, from a data set of classes that are equally large."""

import torch
from torch import Tensor

from gaf_lab.data.sampling import generator


def long_tail(y: Tensor, classes: int, name: str, ratio: float) -> Tensor:
    """The training samples that are kept, in their order; the same for every seed.

    Class c of C keeps ratio^(-c / (C - 1)) of its samples, at least one; those are drawn at random.

    Args:
        y: clean labels (N,) in [0, classes).
        classes: at least 2, or ratio 1.
        name: of the data; which samples are kept depends on it.
        ratio: 1 keeps all.
    """
    kept = torch.ones(len(y), dtype=torch.bool)
    for label in range(1, classes):
        members = (y == label).nonzero()[:, 0]
        count = max(1, round(len(members) * ratio ** (-label / (classes - 1))))
        draw = generator(0, name, "long tail", label)
        kept[members[torch.randperm(len(members), generator=draw)[count:]]] = False
    return kept.nonzero()[:, 0]
