"""A Decision with its evidence as plain numbers, and the one transfer that fetches them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaf.rules.decision import Decision, Evidence


@dataclass(frozen=True)
class Outcome:
    """A Decision with its evidence, on the host, as plain numbers."""

    stepped: bool
    accepted: list[bool]
    distances: list[float]
    weights: list[float]
    norms2: list[float]
    signal: float
    tau: float = math.nan

    @classmethod
    def fetch(cls, decision: Decision, evidence: Evidence) -> "Outcome":
        """The one transfer to the host that a step needs anyway, with all that is worth keeping."""
        return cls.unpack(pack(decision, evidence).tolist())

    @classmethod
    def unpack(cls, flat: list[float]) -> "Outcome":
        """From the 4 k + 3 numbers that `pack` gives."""
        k = len(flat) // 4
        return cls(
            accepted=[bool(a) for a in flat[:k]],
            distances=flat[k : 2 * k],
            weights=flat[2 * k : 3 * k],
            norms2=flat[3 * k : 4 * k],
            stepped=bool(flat[4 * k]),
            signal=flat[4 * k + 1],
            tau=flat[4 * k + 2],
        )

    def without_measures(self) -> "Outcome":
        """The same without distances and norms: a plain all-reduce measures no row."""
        return replace(self, distances=[], norms2=[])

    def as_skip(self) -> "Outcome":
        """The same evidence, no step."""
        k = len(self.accepted)
        return replace(self, stepped=False, accepted=[False] * k, weights=[0.0] * k)

    @property
    def absent(self) -> int:
        """Rows that were zero, NaN or infinite."""
        return sum(map(math.isnan, self.distances))

    @property
    def taken(self) -> int:
        """Accepted rows that were present. `Mean` accepts absent ones too; they count as absent."""
        if not self.distances:
            return sum(self.accepted)
        pairs = zip(self.accepted, self.distances, strict=True)
        return sum(accepted and not math.isnan(distance) for accepted, distance in pairs)

    @property
    def rejected(self) -> int:
        """Rows that were present and not accepted."""
        pairs = zip(self.accepted, self.distances, strict=False)
        return sum(not accepted and not math.isnan(distance) for accepted, distance in pairs)

    @property
    def compared(self) -> list[float]:
        """Distances of the rows that were compared with a running sum.

        These are all present rows but the start, whose own distance is 0.
        """
        return sorted(d for d in self.distances if not math.isnan(d))[1:]


def pack(decision: Decision, evidence: Evidence) -> Tensor:
    """All of both in one vector (4 k + 3,) float64, on their device."""
    parts = (
        decision.accepted,
        decision.distances,
        decision.weights,
        evidence.norms2,
        decision.stepped,
        evidence.signal,
        evidence.tau,
    )
    return torch.cat([p.reshape(-1).to(evidence.norms2) for p in parts])
