"""Gradient clipping of the update that the micro-gradients make."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

import gaf


class Clipped(gaf.Accumulator):
    """An Accumulator that shortens each update to a largest norm, over all parameters together.

    Args:
        optimizer, policy, options: as for gaf.Accumulator.
        norm: the largest norm, above 0.
    """

    def __init__(self, optimizer: Optimizer, policy: Any, norm: float, **options: Any) -> None:
        super().__init__(optimizer, policy, **options)
        self.norm = norm

    def decide(self) -> gaf.Decision:
        decision = super().decide()
        # no gradients after a skip; clipping twice is clipping once
        nn.utils.clip_grad_norm_(self._params.current, self.norm)
        return decision
