"""Differences of paired runs: mean, interval, and the chance of as much without a difference."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Paired:
    """Mean of n differences, its 95% interval, and p, two-sided, by Student's t."""

    mean: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, ones: Sequence[float], others: Sequence[float]) -> "Paired":
        gaps = [a - b for a, b in zip(ones, others, strict=True)]
        n, mean = len(gaps), statistics.mean(gaps)
        error = statistics.stdev(gaps) / math.sqrt(n)
        reach = float(stats.t.ppf(0.975, n - 1)) * error
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
        return cls(mean, mean - reach, mean + reach, p)

    def text(self, digits: int) -> str:
        """ "+1.2 (+0.3 to +2.1), p 0.02"; bold where p < 0.01."""
        span = f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"
        p = "p < 0.0001" if self.p < 1e-4 else f"p {self.p:.2g}"
        found = f"{self.mean:+.{digits}f} ({span}), {p}"
        return f"**{found}**" if self.p < 0.01 else found
