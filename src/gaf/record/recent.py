"""One step, condensed to what the averages over the last steps and the warnings need."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gaf.record.outcome import Outcome

WINDOW = 100  # steps that the averages and the warnings look back


@dataclass(frozen=True)
class Recent:
    """One step. Norms are those of the gradients, whatever the loss scale.

    The cosines are those of the rows to the sum of the others.
    """

    compared: int
    accepted: int  # of the compared rows
    distance_sum: float
    distance_min: float
    dispersion: float
    norm2: float
    signal: float
    tau: float = math.nan
    cosines: int = 0  # that are known
    cosine_sum: float = 0.0
    cosine_min: float = math.nan

    @classmethod
    def of(cls, outcome: Outcome, scale: float) -> "Recent":
        """scale: what a GradScaler multiplied the rows by."""
        # 0 after many overflows: then the norms are unknown
        scale = scale or math.nan
        norms = [math.sqrt(n) / scale for n in outcome.norms2 if 0 < n < math.inf]
        norm2 = math.nan
        if math.isfinite(outcome.signal):
            norm2 = sum(n * n for n in norms) / len(norms)
        cosines = [cosine for cosine in outcome.cosines if not math.isnan(cosine)]
        return cls(
            compared=len(outcome.compared),
            accepted=accepted_among_compared(outcome),
            distance_sum=sum(outcome.compared),
            distance_min=min(outcome.compared, default=math.nan),
            dispersion=dispersion_of(norms),
            norm2=norm2,
            signal=outcome.signal / scale**2,
            tau=outcome.tau,
            cosines=len(cosines),
            cosine_sum=sum(cosines),
            cosine_min=min(cosines, default=math.nan),
        )


def accepted_among_compared(outcome: Outcome) -> int:
    """How many of the rows that were compared with others were accepted."""
    rows = enumerate(zip(outcome.accepted, outcome.distances, strict=False))
    start = outcome.start
    return sum(ok and not math.isnan(distance) and i != start for i, (ok, distance) in rows)


def dispersion_of(norms: list[float]) -> float:
    """Standard deviation over mean; NaN for no norms."""
    if not norms:
        return math.nan
    mean = sum(norms) / len(norms)
    return math.sqrt(sum((n - mean) ** 2 for n in norms) / len(norms)) / mean


def finite_sum(values: Iterable[float]) -> float:
    return math.fsum(value for value in values if math.isfinite(value))


def ratio(a: float, b: float) -> float:
    """a / b; NaN for b = 0."""
    return a / b if b else math.nan
