"""The numbers gathered between two evaluations."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gaf


@dataclass(eq=False)
class Interval:
    """Sums and counts over the steps since the last evaluation."""

    losses: Tensor
    rows: list[int]
    accepted: int = 0
    micro_gradients: int = 0
    distances: int = 0
    distance_sum: float = 0.0
    distance_min: float = math.nan
    signal: float = 0.0
    norm2: float = 0.0
    seconds: float = 0.0

    @classmethod
    def empty(cls, device: torch.device) -> "Interval":
        return cls(losses=torch.zeros((), device=device), rows=[])

    def add(self, outcome: gaf.Outcome) -> None:
        self.rows.append(sum(outcome.accepted))
        self.accepted += sum(outcome.accepted)
        self.micro_gradients += len(outcome.accepted)
        self.distances += len(outcome.compared)
        self.distance_sum += sum(outcome.compared)
        known = [d for d in (self.distance_min, *outcome.compared) if not math.isnan(d)]
        self.distance_min = min(known, default=math.nan)
        norms2 = [norm2 for norm2 in outcome.norms2 if 0 < norm2 < math.inf]
        if norms2 and math.isfinite(outcome.signal):
            self.signal += outcome.signal
            self.norm2 += sum(norms2) / len(norms2)

    def line(self, b: int, loss: float) -> dict[str, Any]:
        """These numbers as part of an evaluation line.

        loss: the sum over the micro-batches of all ranks; `losses` has this rank's.
        """
        return {
            "train_loss": loss / self.micro_gradients,
            "acceptance": self.accepted / self.micro_gradients,
            "distance_mean": self.distance_sum / self.distances if self.distances else None,
            "distance_min": self.distance_min,
            "distance_pairs": 1 - self.signal / self.norm2 if self.norm2 else None,
            "samples_per_second": self.micro_gradients * b / self.seconds if self.seconds else None,
            "rows": self.rows,
        }
