"""What GAF would do with macro-batches drawn from measured rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gaf.rules.policies import GAF
from gaf.rules.sequential import walk
from gaf.shapes import Float64

DRAWS = 2000  # macro-batches made of the measured rows


@dataclass(frozen=True)
class Acceptance:
    """Two shares in [0, 1]: of compared rows that were accepted, and of steps that were taken.

    Attributes:
        rows: of the k - 1 compared micro-gradients, those that were accepted.
        steps: of the steps, those that were taken.
    """

    rows: float
    steps: float


def measure_acceptance(
    gram: Float64[Tensor, "r r"], k: int, tau: float, draws: int = DRAWS
) -> Acceptance:
    """What GAF(tau) does with macro-batches of k of the r rows; every call draws the same ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.rand(draws, len(gram), generator=generator, dtype=torch.float32, device="cpu")
    chosen = numbers.argsort(1)[:, :k].to(gram.device)
    accepted, _, _ = walk(GAF(tau), gram, chosen)
    count = accepted.sum(1).clamp_min(1)
    rows = (count - 1).double().mean() / (k - 1)
    return Acceptance(float(rows), float((count >= 2).double().mean()))
