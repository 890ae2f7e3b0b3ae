"""A long tail: classes of different sizes, from a data set of classes that are equally large."""

import dataclasses

import torch
from torch import Tensor

from gaf_lab.data.dataset import DataSet
from gaf_lab.data.sampling import generator


def long_tail(data: DataSet, ratio: float) -> Tensor:
    """The training samples that are kept, in their order; the same for every seed.

    Class c of C keeps ratio^(-c / (C - 1)) of its samples, at least one; those are drawn at random.

    ratio: 1 keeps all.
    """
    kept = torch.ones(len(data.train_y), dtype=torch.bool)
    for label in range(1, data.classes):
        members = (data.train_y == label).nonzero()[:, 0]
        count = max(1, round(len(members) * ratio ** (-label / (data.classes - 1))))
        draw = generator(0, data.name, "long tail", label)
        kept[members[torch.randperm(len(members), generator=draw)[count:]]] = False
    return kept.nonzero()[:, 0]


def keep_only(data: DataSet, kept: Tensor) -> DataSet:
    """The data set with these training samples, in memory."""
    if len(kept) == len(data.train_y):
        return data
    assert isinstance(data.train_x, Tensor)
    human = None if data.human is None else data.human[kept]
    return dataclasses.replace(
        data, train_x=data.train_x[kept], train_y=data.train_y[kept], human=human
    )
