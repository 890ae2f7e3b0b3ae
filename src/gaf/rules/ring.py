"""start="best" and start="worst": every present row is tried as the start of the sum.

Start s visits the rows s, s + 1, ... around the ring, and one start is kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.rules.agreement import cosines_of
from gaf.rules.gram import is_present
from gaf.rules.sequential import Sequential
from gaf.rules.visits import Visited, plain_walk
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


def walk_from_best(
    policy: Sequential, gram: Float64[Tensor, "k k"], least: int, fewest: bool
) -> tuple[list[int], list[bool], Float64[Tensor, "2 k"]]:
    """From the start to keep, on the host; arguments as for `choose_start`.

    Returns:
        The order of the visit; which rows were accepted; their distances and signals.
    """
    k = len(gram)
    orders = [[(start + i) % k for i in range(k)] for start in range(k)]
    present = is_present(gram.diagonal()).tolist()
    visited: list[list[Visited]] = []
    accepted: list[list[bool]] = []
    for start, rows in enumerate(plain_walk(policy, gram, orders)):
        visited.append(rows)
        accepted.append([joins for joins, _, _ in rows])
        if not fewest and present[start] and accepted[start] == present:
            break  # none accepts more, and of equals the lowest start is kept
    else:
        start = plain_start(gram, accepted, least, fewest)
    numbers = [[row[1] for row in visited[start]], [row[2] for row in visited[start]]]
    found = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return orders[start], accepted[start], found


def plain_start(
    gram: Float64[Tensor, "k k"], accepted: Sequence[Sequence[bool]], least: int, fewest: bool
) -> int:
    """`choose_start` on the host, without cosines where the starts left accept the same rows."""
    present, counts = is_present(gram.diagonal()).tolist(), list(map(sum, accepted))
    left = [s for s, here in enumerate(present) if here and counts[s] >= least]
    if not left:
        return 0
    wanted = (min if fewest else max)(counts[s] for s in left)
    left = [s for s in left if counts[s] == wanted]
    if all(accepted[s] == accepted[left[0]] for s in left):
        return left[0]
    start = choose_start(gram, torch.tensor(accepted, device="cpu"), least, fewest)
    return int(start[None].tolist()[0])


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
