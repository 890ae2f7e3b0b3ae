"""start="best" and start="worst": every present row is tried as the start of the sum.

Start s visits the rows s, s + 1, ... around the ring, and one start is kept.
"""

import math

import torch
from torch import Tensor

from gaf.rules.agreement import cosines_of
from gaf.rules.gram import is_present
from gaf.shapes import Bool, Float64, Int


def ring_orders(k: int, device: torch.device) -> Int[Tensor, "k k"]:
    """By start, the order of the visit."""
    row = torch.arange(k, device=device)
    return (row[:, None] + row) % k


def choose_start(
    gram: Float64[Tensor, "k k"], accepted: Bool[Tensor, "k k"], least: int, fewest: bool = False
) -> Int[Tensor, ""]:
    """The start to keep, of those that accept at least `least` rows.

    Args:
        gram: (k, k).
        accepted: (k, k), by start, which rows were accepted.
        least: rows that a start must accept.
        fewest: keep the start that accepts fewest rows and, among equals, the lowest mean cosine;
            otherwise most rows and the highest mean cosine. Among equals again, the lowest start.
    """
    count, cosine = accepted.sum(1).double(), mean_pairwise_cosine(gram, accepted)
    sign = -1.0 if fewest else 1.0
    left = is_present(gram.diagonal()) & (count >= least)
    for score in (sign * count, sign * cosine):
        score = torch.where(left, score, -math.inf)
        left = left & (score == score.max())
    return left.int().argmax()


def mean_pairwise_cosine(
    gram: Float64[Tensor, "k k"], accepted: Bool[Tensor, "s k"]
) -> Float64[Tensor, " s"]:
    """By start, the mean cosine over pairs i < j of accepted rows; 0 without a pair.

    Equal sets of rows give equal bits.
    """
    sound = is_present(gram.diagonal())
    cosines = torch.where(sound & sound[:, None], cosines_of(gram), 0.0)
    total, taken = gram.new_zeros(len(accepted)), accepted.double()
    for j in range(1, len(gram)):
        total = total + taken[:, j] * (taken[:, :j] * cosines[:j, j]).sum(1)
    count = taken.sum(1)
    return total / (count * (count - 1) / 2).clamp_min(1)
