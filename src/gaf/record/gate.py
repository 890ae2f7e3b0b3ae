"""Learning-rate schedulers that stand still on a skip."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_gates: WeakKeyDictionary[Any, "Gate"] = WeakKeyDictionary()


class Gate:
    """Open for one call of scheduler.step() after each step that was taken.

    Args:
        progress: gives (steps decided, steps taken) so far.
    """

    def __init__(self, progress: Callable[[], tuple[int, int]]) -> None:
        self.progress = progress
        self.decided, self.taken = progress()
        self.called = False

    def passes(self, name: str) -> bool:
        """Whether the optimizer moved since the last call. name: the scheduler's, for the message.

        Raises:
            RuntimeError: if the scheduler is not stepped after every step.
        """
        decided, taken = self.progress()
        if self.called and decided - self.decided > 1:
            raise RuntimeError(
                f"gate: {name}.step() must be called after every step, because a gate holds it "
                f"back on a skip; {decided - self.decided} steps went by since the last call. "
                "A scheduler stepped once per epoch needs no gate: use the ungated one."
            )
        moved = taken > self.taken
        self.decided, self.taken, self.called = decided, taken, True
        return moved


class GatedScheduler:
    """The first base of a gated scheduler's class: its step() goes through the gate."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        own = None if getattr(self, "_is_initial", False) else _gates.get(self)
        if own is None or own.passes(type(self).__name__):
            super().step(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain scheduler, of the class before gating: no gate follows it."""
        return new_without_init, (type(self).__mro__[2],), self.__dict__


def new_without_init(kind: Any) -> Any:
    return kind.__new__(kind)


def gate(scheduler: LRScheduler, progress: Callable[[], tuple[int, int]]) -> LRScheduler:
    """Changes the scheduler in place, so that whoever holds it sees it stand still.

    It changes the object's class, not its attributes: its state_dict stays as it was. A copied or
    unpickled scheduler is not gated, nor is one whose handle was detached.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "gate: ReduceLROnPlateau is stepped once per evaluation with a metric, not once per "
            "optimizer step; got one. Use it as it is: a skip does not touch it."
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            "gate: the scheduler must be a torch.optim.lr_scheduler.LRScheduler; "
            f"got {type(scheduler).__name__}. Call its step() only after a step that was taken."
        )
    if not isinstance(scheduler, GatedScheduler):
        kind = type(scheduler)
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        scheduler.__class__ = type(kind.__name__, (GatedScheduler, kind), names)
    _gates[scheduler] = Gate(progress)
    return scheduler


def ungate(scheduler: "ref[Any]", progress: Callable[[], tuple[int, int]]) -> None:
    """Frees a scheduler that still follows `progress`."""
    gated = scheduler()
    if gated in _gates and _gates[gated].progress is progress:
        del _gates[gated]
