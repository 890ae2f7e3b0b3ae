"""A Decision with its evidence as plain numbers, and the one transfer that fetches them."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gaf.rules.decision import Decision, Evidence


@dataclass(frozen=True)
class Outcome:
    """A Decision with its evidence, on the host, as plain numbers.

    Attributes:
        cosines: each row's to the sum of the others, NaN where unknown; empty if they were not
            measured.
    """

    stepped: bool
    accepted: list[bool]
    distances: list[float]
    weights: list[float]
    norms2: list[float]
    signal: float
    tau: float = math.nan
    cosines: list[float] = field(default_factory=list)

    @classmethod
    def fetch(cls, decision: Decision, evidence: Evidence) -> "Outcome":
        """The one transfer to the host that a step needs anyway, with all that is worth keeping."""
        if evidence.norms2.device.type != "cpu":
            return cls.unpack(pack(decision, evidence).tolist())
        return cls(
            accepted=decision.accepted.tolist(),
            distances=decision.distances.tolist(),
            weights=decision.weights.tolist(),
            norms2=evidence.norms2.tolist(),
            stepped=decision.stepped.item(),  # type: ignore[arg-type]
            signal=evidence.signal.item(),
            tau=evidence.tau.item(),
        )

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
        """The same without distances, norms and cosines: a plain all-reduce measures no row."""
        return replace(self, distances=[], norms2=[], cosines=[])

    def as_skip(self) -> "Outcome":
        """The same evidence, no step."""
        k = len(self.accepted)
        return replace(self, stepped=False, accepted=[False] * k, weights=[0.0] * k)

    @property
    def measured(self) -> bool:
        """Whether the rows were looked at."""
        return bool(self.distances)

    @cached_property
    def absences(self) -> list[bool]:
        """Which rows were zero, NaN or infinite.

        Such a row has no distance. The others may have none either: beside one row that is not
        finite no cosine to a sum is known.
        """
        if not self.measured:
            return [False] * len(self.accepted)
        pairs = zip(self.distances, self.norms2, strict=True)
        return [math.isnan(distance) and not 0 < n < math.inf for distance, n in pairs]

    @property
    def absent(self) -> int:
        """Rows that were zero, NaN or infinite."""
        return sum(self.absences)

    @property
    def taken(self) -> int:
        """Accepted rows that were present. `Mean` accepts absent ones too; they count as absent."""
        pairs = zip(self.accepted, self.absences, strict=True)
        return sum(accepted and not absent for accepted, absent in pairs)

    @property
    def rejected(self) -> int:
        """Rows that were present and not accepted."""
        if not self.measured:
            return 0
        pairs = zip(self.accepted, self.absences, strict=True)
        return sum(not accepted and not absent for accepted, absent in pairs)

    @property
    def start(self) -> int | None:
        """The row that the running sum started from: at distance 0.

        None without one, as where each row is compared with the sum of all the others.
        """
        return self.distances.index(0.0) if 0.0 in self.distances else None

    @cached_property
    def compared(self) -> list[float]:
        """Distances of the rows that were compared with others, in ascending order.

        These are all rows with a distance but the start.
        """
        known = sorted(d for d in self.distances if not math.isnan(d))
        return known[1:] if known and known[0] == 0 else known


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
