"""What the ranks add up: their shares of what a policy is shown, and two numbers beside them."""

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from gaf.ranks.messages import add_in_rank_order
from gaf.record.hints import frames_inside
from gaf.record.outcome import Outcome

MIXED = (
    "A step was not measured: its gradients were added to the last update, and show no worker by "
    "itself. Call optimizer.zero_grad() after every step, and accumulate under "
    "`with model.no_sync():`."
)


class Totals:
    """Sums over all ranks.

    Args:
        scaler: the loop's, if it is enabled.

    Attributes:
        scale: what the scaler has multiplied the rows by.
        mixed: above 0 if a rank's gradients were added to the last update.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        self.scaler = scaler
        self.scale, self.mixed = 1.0, 0.0
        self._warned = False

    def add_up(
        self, partial: Tensor, mixed: Tensor | None, groups: "Sequence[dist.ProcessGroup]"
    ) -> Tensor:
        """The sum of all ranks' shares, in the shape of `partial`, float64, on the host.

        Args:
            partial: this rank's share.
            mixed: (), this rank's share of the attribute; None is 0.
            groups: to add over, one after the other.
        """
        flag = partial.new_zeros(1) if mixed is None else mixed.to(partial).reshape(1)
        known, ranks = torch.cat([partial.reshape(-1), self._loss_scale(partial), flag]), 1
        for group in groups:
            known = add_in_rank_order(known.to(partial.device), group)
            ranks *= dist.get_world_size(group)
        self.scale, self.mixed = float(known[-2]) / ranks, float(known[-1])
        return known[:-2].view(partial.shape)

    def _loss_scale(self, like: Tensor) -> Tensor:
        factor = None if self.scaler is None else self.scaler._scale  # None before the first loss
        return like.new_ones(1) if factor is None else factor.to(like).reshape(1)

    def without_mixture(self, outcome: Outcome) -> Outcome:
        """The outcome, without its measures if they are of gradients added to an update."""
        if not self.mixed:
            return outcome
        if not self._warned:
            warnings.warn(f"gaf: {MIXED}", stacklevel=frames_inside() + 1)
        self._warned = True
        return outcome.without_measures()
