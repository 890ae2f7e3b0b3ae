"""How likely each given label is wrong, from a model's probabilities; needs no truth.

    quality = (1 + p[given] - max of the other p) / 2

The confident joint (Northcutt et al., JAIR 2021) estimates how many labels are wrong: a sample
counts as of class j if p[j] is at least the mean p[j] of the samples labelled j. For each label,
the share of its samples that count as of another class, times its number of samples, is the
estimate of its wrong labels; these add up.
"""

import torch
from torch import Tensor


def label_quality(p: Tensor, given: Tensor) -> Tensor:
    """The quality of each given label, (n,) in [0, 1]; below 1/2 if another class is more probable.

    Args:
        p: probabilities (n, classes), which add up to 1 in each row.
        given: labels (n,).
    """
    own = p.gather(1, given[:, None])[:, 0]
    other = p.scatter(1, given[:, None], 0).amax(1)
    return (1 + own - other) / 2


def count_wrong_labels(p: Tensor, given: Tensor) -> int:
    """The confident joint's estimate, from probabilities (n, classes) and given labels (n,)."""
    classes = p.shape[1]
    # NaN for a label that no sample has: no sample counts as of that class.
    usual = torch.stack([p[given == j, j].mean() for j in range(classes)])
    confident = p >= usual
    sure = confident.any(1)
    counted = torch.where(confident, p, -1).argmax(1)
    pairs = torch.bincount(given[sure] * classes + counted[sure], minlength=classes**2)
    joint = pairs.view(classes, classes).double()
    shares = joint / joint.sum(1, keepdim=True).clamp(min=1)
    sizes = torch.bincount(given, minlength=classes)
    return round(float((sizes * (shares.sum(1) - shares.diagonal())).sum()))


def mark_lowest(quality: Tensor, count: int) -> Tensor:
    """(n,) bool: marks the `count` samples of lowest quality."""
    marked = torch.zeros(len(quality), dtype=torch.bool)
    marked[quality.argsort(stable=True)[:count]] = True
    return marked
