"""Whose micro-gradients may wait: one Accumulator for an optimizer, one at a time for a scaler."""

from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

from torch.amp import GradScaler
from torch.optim import Optimizer

from gaf.device.checks import variable


@runtime_checkable
class Claimant(Protocol):
    """An Accumulator, as far as this file needs it."""

    subject: str  # of messages
    _stepping: bool  # whether an optimizer's step is the Accumulator's own

    @property
    def waiting(self) -> bool: ...
    def _give_way(self) -> None: ...


_optimizer_users: WeakKeyDictionary[Optimizer, WeakSet[Claimant]] = WeakKeyDictionary()
_scaler_users: WeakKeyDictionary[GradScaler, "ref[Claimant]"] = WeakKeyDictionary()


def claim_optimizer(optimizer: Optimizer, user: Claimant) -> None:
    """Makes `user` the one whose micro-gradients wait, and lets no other code step the optimizer.

    What waits in an older Accumulator of the optimizer is dropped.
    """
    users = _optimizer_users.setdefault(optimizer, WeakSet())
    for older in users:
        older._give_way()
    users.add(user)
    finalize(user, optimizer.register_step_pre_hook(partial(refuse_step, ref(user))).remove)


def refuse_step(user: "ref[Claimant]", optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before every step of an optimizer: while micro-gradients wait, only the Accumulator steps."""
    acc = user()
    if acc is not None and acc.waiting and not acc._stepping:
        raise RuntimeError(
            f"{acc.subject}: {type(optimizer).__name__}.step() must not be called while "
            f"micro-gradients wait; it was. Call {variable(acc.subject)}.step() in its place: it "
            "decides, steps the optimizer or leaves it, and clears the gradients."
        )


def claim_scaler(scaler: GradScaler, user: Claimant) -> None:
    """Refuses a scaler under which another Accumulator's micro-gradients wait.

    The first of the two to step would change the other's scale.
    """
    other = _scaler_users.get(scaler, lambda: None)()
    if other is not None and other is not user and other.waiting:
        raise ValueError(
            f"{user.subject}: scaler must serve one macro-batch at a time, because step() updates "
            "its scale; another object has micro-gradients waiting under it. Call its step() "
            "first, or make a GradScaler for each."
        )
    _scaler_users[scaler] = ref(user)
