"""Memory that an exchange keeps from step to step."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SpareMemory:
    """Memory of the step before: fresh memory costs a CPU a page fault for every 4 KiB."""

    def __init__(self, flats: Sequence[Tensor] = ()) -> None:
        self.flats = list(flats)

    def take_like(self, flat: Tensor) -> Tensor:
        """A tensor of the same size, dtype and device: a spare one, or the head of a longer one.

        Longer ones occur because DDP cuts its buckets anew after a while.
        """
        alike = [s for s in self.flats if s.dtype == flat.dtype and s.device == flat.device]
        fit = [spare for spare in alike if len(spare) >= len(flat)]
        if not fit:
            return torch.empty_like(flat)
        best = min(fit, key=len)
        self.flats = [spare for spare in self.flats if spare is not best]
        if len(best) > len(flat):
            self.flats.append(best[len(flat) :])
        return best[: len(flat)]
