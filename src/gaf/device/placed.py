"""Checks at step() that the update which decide() put into p.grad is still there."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SOME = 16  # gradients of an optimizer that are sampled first, at least, if it has as many
EACH = 32  # coordinates of each
RARELY = 100  # reading an accelerator's memory waits for it: only at every so many updates


class PlacedUpdate:
    """The update between decide() and step(): it may be clipped, scaled, edited, or replaced.

    It may not be gone, as after zero_grad(), and an optimizer's whole part of it may not be
    overwritten with zeros, as after zero_grad(set_to_none=False). The second is checked only if
    all of the part was written to.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.looks = 0  # checks of updates on an accelerator that were written to
        self.parts: list[Part] = []

    def note(self) -> None:
        """Remembers the update as it is now."""
        self.parts = [part for part in map(Part, self.optimizers) if part.params]

    @torch.no_grad()
    def check(self, names: dict[nn.Parameter, str], subject: str) -> None:
        """RuntimeError where the update, or a part of it, is no longer there."""
        gone = [p for part in self.parts for p in part.params if p.grad is None]
        if gone:
            whole = len(gone) == sum(len(part.params) for part in self.parts)
            raise_lost("it was gone" if whole else f"that of {names[gone[0]]!r} was gone", subject)
        for part in self.parts:
            if part.is_written() and self._may_look(part) and part.is_zeros():
                what = f"all of its optimizer's with {names[part.params[0]]!r} was zeros"
                raise_lost(what, subject)

    def _may_look(self, part: "Part") -> bool:
        if part.before.device.type == "cpu":
            return True
        self.looks += 1
        return self.looks % RARELY == 1


class Part:
    """One optimizer's gradients as they were placed. Holds none of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.params = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        some = self.params[:: max(len(self.params) // SOME, 1)]
        self.marks = [(p, id(p.grad), p.grad._version) for p in some]
        self.before = sample(some)

    def is_written(self) -> bool:
        """Whether every gradient of the sample was written to in place."""
        return all(id(p.grad) == there and p.grad._version != v for p, there, v in self.marks)

    def is_zeros(self) -> bool:
        """Whether an update that was not zero is all zeros now.

        An update that was multiplied by zero has kept its signs, and is not meant.
        """
        was = (self.before.isfinite() & (self.before != 0)).any()
        now = sample([p for p, _, _ in self.marks])
        cleared = was & ~now.any() & ~now.signbit().any()
        return bool(cleared) and not any(bool(p.grad.any()) for p in self.params)


def sample(params: Sequence[nn.Parameter]) -> Tensor:
    """Coordinates spread over each gradient's memory, taken without waiting for the device."""
    grads = [p.grad for p in params if p.grad is not None and p.grad.numel()]
    spread = [g.as_strided((min(g.numel(), EACH),), (max(g.numel() // EACH, 1),)) for g in grads]
    return torch.cat(spread) if spread else torch.zeros(0, device="cpu")


def raise_lost(what: str, subject: str) -> NoReturn:
    raise RuntimeError(
        f"{subject}: the update that decide() put into p.grad must still be there; {what}, and "
        "no step was taken. Leave out zero_grad(): step() clears the gradients itself. To hold a "
        "parameter still, freeze it with requires_grad_(False) before the macro-batch."
    )
