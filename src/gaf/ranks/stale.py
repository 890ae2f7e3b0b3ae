"""Which gradients hold an update when a backward pass begins, and which the pass has added to.

An update to which a new gradient was added is no micro-gradient: an optimizer must not step on the
mixture. A pass that no step follows may leave an update behind, as a GAN's generator step does in
the discriminator, which is cleared before its own pass.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

IN_PART = 1e6  # a rank's answer if one optimizer was cleared and another was not; 1 if none was
CLEAR_FIRST = (
    "attach: the gradients must be cleared before a backward pass that synchronises; the last "
    "update was still there and would mix with the new micro-gradients. Call optimizer.zero_grad() "
    "first, for every optimizer, or accumulate under `with model.no_sync():` "
    "(FSDP2: model.set_requires_gradient_sync(False))."
)


class StaleGradients:
    """Follows one pass after the other; a pass includes the accumulation that its decision covers.

    A gradient that is None was cleared. One that is a tensor may have been filled with zeros: it is
    looked at, on its device, without waiting for the answer.

    Args:
        params: those that are decided on.
        active: whether a mixture matters. Plain averaging adds up to the same with it, if nothing
            is measured.
    """

    def __init__(self, params: set[Tensor], active: bool) -> None:
        self.params, self.active = params, active
        self._decided = False  # whether there was a decision, whose update gradients may hold
        self._open = False  # whether a pass has begun
        self._updated: set[Tensor] = set()  # parameters with a gradient when the pass began
        self._arrived: set[Tensor] = set()  # parameters that the pass has reached on this rank
        self._flags: dict[Tensor, Tensor] = {}  # of those with an update: whether it was one

    def open(self) -> None:
        """Begins a pass, if none has begun."""
        if self._open:
            return
        self._open = True
        self._updated = {p for p in self.params if p.grad is not None} if self._decided else set()
        self._arrived, self._flags = set(), {}

    def look(self, p: Tensor) -> None:
        """Looks at a parameter's gradient just before a backward pass adds to it."""
        if p.grad is None:
            if self._flags:  # a tensor's hash takes long
                self._flags.pop(p, None)
        elif p in self._flags:
            self._flags[p] = self._flags[p] & is_set(p)
        elif self.active and p in self._updated and p not in self._arrived:
            self._flags[p] = is_set(p)
        self._arrived.add(p)

    def survey(self) -> None:
        """Looks at all gradients at the start of a backward pass that may add to them or not."""
        self._open = False
        self.open()
        self._flags = {p: is_set(p) for p in self._updated} if self.active else {}

    def reach(self, params: Iterable[Tensor]) -> None:
        """After a survey: the pass has added to these."""
        self._arrived.update(params)

    def reached_parameters(self) -> set[Tensor]:
        """Parameters that the pass has reached on this rank so far."""
        return set(self._arrived)

    def holds_old_update(self, p: Tensor) -> bool:
        """Whether a parameter holds an earlier pass's gradient, not reached on this rank so far."""
        return p in self._updated and p not in self._arrived and p.grad is not None

    def added_to_updates(self, optimizers: Sequence[Sequence[Tensor]] = ()) -> Tensor | None:
        """() float64, above 0 if a gradient was added to an update; None is 0.

        Args:
            optimizers: the parameters of each, if all of them have stepped on the last update: then
                it is certainly a mistake that one was cleared and another was not.
        """
        flags = [flag for p, flag in self._flags.items() if p in self._arrived]
        if not flags:
            return None
        cleared = [all(p not in self._updated for p in params) for params in optimizers]
        weight = IN_PART if any(cleared) else 1.0
        return weight * torch.stack(flags).any().double()

    def close(self) -> None:
        """The pass's last decision is taken: gradients are updates from here on."""
        self._open, self._decided, self._flags = False, True, {}


def is_set(p: Tensor) -> Tensor:
    """(): whether any coordinate of a parameter's gradient is not zero.

    For a DTensor: of this rank's shard.
    """
    assert p.grad is not None
    grad: Tensor = getattr(p.grad, "_local_tensor", p.grad)
    return (grad != 0).any()
