"""Notices a backward pass that adds to gradients which still hold the last update.

Such a mixture is no micro-gradient. It is an error where part of the gradients was cleared and part was not, and
wherever an optimizer steps on it. A pass that no step follows may leave it behind: a GAN's generator step adds to the
discriminator's gradients, which are cleared before they are used.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

IN_PART = 1e6  # of a rank where some gradients were cleared and others were not; 1 where none was
CLEAR_FIRST = (
    "attach: the gradients must be cleared before a backward pass that synchronises; the last update was still there "
    "and would mix with the new micro-gradients. Call optimizer.zero_grad() first, for every optimizer, or accumulate "
    "under `with model.no_sync():` (FSDP2: model.set_requires_gradient_sync(False))."
)


class StaleGradients:
    """Which gradients of a model hold an update, and which of them a backward pass has added to.

    A gradient that is None was cleared. One that is a tensor may have been filled with zeros: it is looked at, on its
    device, without waiting for the answer.

    Args:
        active: whether a mixture matters. Plain averaging adds up to the same with it.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self._updated: set[Tensor] = (
            set()
        )  # parameters whose gradient is an update, unless cleared since
        self._arrived: set[Tensor] = set()  # parameters with a gradient of this step's
        self._flags: dict[
            Tensor, Tensor
        ] = {}  # of those that were added to: whether an update was there
        self._pass = -1
        self._cleared = False  # whether this pass found a gradient that was cleared

    def look(self, p: Tensor) -> None:
        """Looks at a parameter's gradient just before a backward pass adds to it."""
        self._begin_pass()
        if p.grad is None:
            self._cleared = self._cleared or p in self._updated
            self._flags.pop(p, None)
        elif self.active and (p in self._updated or p in self._flags):
            here = is_set(p.grad)
            self._flags[p] = here & self._flags[p] if p in self._flags else here
        self._updated.discard(p)
        self._arrived.add(p)

    def survey(self) -> None:
        """Looks at all gradients at the start of a pass, which may add to them or not; the last such look counts."""
        self._cleared = any(p.grad is None for p in self._updated)
        holding = [p for p in self._updated if p.grad is not None]
        self._flags = {p: is_set(p.grad) for p in holding} if self.active else {}

    def replace(self, params: Iterable[Tensor]) -> None:
        """After a survey: these parameters have gradients of this step's."""
        self._updated.difference_update(params)
        self._arrived.update(params)

    def waits(self, p: Tensor) -> bool:
        """Whether a parameter holds the update of an earlier pass, and this pass has not reached it on this rank."""
        return p in self._updated and p.grad is not None

    def waiting(self) -> set[Tensor]:
        return {p for p in self._updated if p.grad is not None}

    def found(self) -> Tensor | None:
        """At a decision: () float64, above 0 where an update was added to; None is 0.

        The gradients of the parameters that were reached are updates from here on.
        """
        flags = [flag for p, flag in self._flags.items() if p in self._arrived]
        self._flags = {p: flag for p, flag in self._flags.items() if p not in self._arrived}
        in_part = self._cleared or (flags and any(p.grad is None for p in self._updated))
        self._updated |= self._arrived
        self._arrived = set()
        if not flags:
            return None
        return (IN_PART if in_part else 1.0) * torch.stack(flags).any().double()

    def forget(self, p: Tensor) -> None:
        """A gradient was taken away by a skip."""
        self._updated.discard(p)

    def _begin_pass(self) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass, self._cleared = current, False


def is_set(grad: Tensor | None) -> Tensor:
    """(): whether any coordinate is not zero."""
    assert grad is not None
    return (local(grad) != 0).any()


def local(grad: Tensor) -> Tensor:
    """This rank's shard, of a DTensor."""
    return getattr(grad, "_local_tensor", grad)
