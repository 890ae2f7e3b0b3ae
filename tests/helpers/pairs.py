"""Cases for tests of several factors: each pair of levels once, not each combination of all."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[int, int, int, int]  # factor, its level, another factor, its level


def each_pair(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of levels in which each two levels of different factors occur together."""
    cases = list(product(*(range(len(levels)) for levels in factors)))
    missing = {pair for case in cases for pair in pairs_of(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        chosen.append(tuple(levels[i] for levels, i in zip(factors, best, strict=True)))
    return chosen


def pairs_of(case: Sequence[int]) -> set[Pair]:
    return {(f, i, g, j) for (f, i), (g, j) in combinations(enumerate(case), 2)}
