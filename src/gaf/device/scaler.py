"""Loss scaling: a GradScaler's part in a macro-batch, in which it may have no update to look at."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gaf.device.claims import Claimant, claim_scaler
from gaf.device.parameters import all_parameters, grad_dtype
from gaf.rules.contract import Policy
from gaf.rules.judging import has_overflow


class LossScaling:
    """Scales losses, unscales updates and steps the optimizers; without a scaler, it only steps.

    Args:
        scaler: may be None, or disabled.
        optimizers: that share one decision.
    """

    def __init__(self, scaler: GradScaler | None, optimizers: Sequence[Optimizer]) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.optimizers = optimizers

    def claim(self, user: Claimant) -> None:
        if self.scaler is not None:
            claim_scaler(self.scaler, user)

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    @property
    def factor(self) -> float:
        """What the losses of this macro-batch were multiplied by. Waits for the device."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def has_overflowed(self, policy: Policy, norms2: Sequence[float], factor: float) -> bool:
        """Whether the scale was too large for the rows, or has fallen to 0 after many overflows.

        Nothing can be unscaled with a scale of 0. The caller passes `factor`, because reading it
        waits for the device.
        """
        return self.scaler is not None and (factor == 0 or has_overflow(policy, norms2))

    def unscale(self, overflow: bool) -> None:
        """Has the scaler look at every optimizer's update; after a skip, at a stand-in for it."""
        if self.scaler is None:
            return
        for optimizer in self.optimizers:
            if has_gradients(optimizer):
                self.scaler.unscale_(optimizer)
            elif (p := first_trainable(optimizer)) is not None:
                value = float("inf") if overflow else 0.0
                p.grad = torch.full_like(p, value, dtype=grad_dtype(p))
                self.scaler.unscale_(optimizer)
                p.grad = None

    def step(self) -> None:
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            elif has_gradients(optimizer):
                self.scaler.step(optimizer)

    def update(self) -> None:
        if self.scaler is not None:
            self.scaler.update()


def has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for p in all_parameters([optimizer]))


def first_trainable(optimizer: Optimizer) -> nn.Parameter | None:
    """The first parameter that can have a gradient with numbers in it."""
    trained = (p for p in all_parameters([optimizer]) if p.requires_grad and p.numel())
    return next(trained, None)
