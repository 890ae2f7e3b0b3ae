"""Hooks around every step() of the optimizers, those with a closure too, and their progress."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gaf.ranks.optimizer_steps import fused_overflow, parameters_of, place_of_closure


class StepHooks:
    """Watches the optimizers until `remove`.

    Args:
        scaled: whether a GradScaler is in use.
        before: (optimizer) is called when its gradients are ready: before a step, or within it,
            after its closure. It may raise, and no step is in progress then.
        after: (overflow) is called after a step.

    Attributes:
        progress: per optimizer, its steps so far and those of them that moved something; unlike
            stats, not restored.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        scaled: bool,
        before: Callable[[Optimizer], None],
        after: Callable[[bool], None],
    ) -> None:
        self.scaled, self.before, self.after = scaled, before, after
        self.progress = dict.fromkeys(optimizers, (0, 0))
        self._stepped: set[Optimizer] = set()  # since the last decision
        # Steps in progress, since a step() may call its base class's, and closures that run.
        self._depth: dict[Optimizer, int] = {}
        self._closures = 0
        self._removals: list[Callable[[], None]] = []
        for optimizer in optimizers:
            self._removals.append(optimizer.register_step_pre_hook(self._before_step).remove)
            self._removals.append(optimizer.register_step_post_hook(self._after_step).remove)

    def remove(self) -> None:
        while self._removals:
            self._removals.pop()()
        self.progress, self._depth, self._stepped = {}, {}, set()

    def begin_pass(self) -> None:
        if not self._closures:
            self._depth.clear()  # of a step that an exception ended

    def end_pass(self) -> None:
        self._stepped = set()

    def watches(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer is one of those that were given to attach."""
        return optimizer in self.progress

    @property
    def stepping(self) -> bool:
        """Whether a step of one of the optimizers is in progress."""
        return any(self._depth.values())

    def all_stepped(self) -> list[list[Tensor]]:
        """Each optimizer's parameters, if there are several and all stepped on the last update."""
        if len(self.progress) < 2 or self._stepped != self.progress.keys():
            return []
        return [parameters_of(optimizer) for optimizer in self.progress]

    def progress_of(self, scheduler: Any) -> Callable[[], tuple[int, int]]:
        """Steps of the scheduler's optimizer, and those of them that moved something.

        Raises:
            ValueError: if the scheduler drives none of the optimizers.
        """
        optimizer = getattr(scheduler, "optimizer", None)
        if optimizer not in self.progress:
            ours = {p for one in self.progress for p in parameters_of(one)}
            theirs = parameters_of(optimizer) if isinstance(optimizer, Optimizer) else []
            if len(self.progress) > 1 or not ours.intersection(theirs):
                raise ValueError(
                    "gate: the scheduler must drive one of the optimizers that were given to "
                    f"attach; its optimizer, a {type(optimizer).__name__}, is none of them. "
                    "Build the scheduler on one of those."
                )
            optimizer = next(iter(self.progress))
        return lambda: self.progress.get(optimizer, (0, 0))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a step, or within one: if a subclass calls its base class's, both report."""
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1
        place = place_of_closure(type(optimizer), args, kwargs)
        if place is None:
            self._prepare(optimizer)
            return None
        if isinstance(place, str):
            return args, {**kwargs, place: partial(self._evaluate, optimizer, kwargs[place])}
        evaluate = partial(self._evaluate, optimizer, args[place])
        return (*args[:place], evaluate, *args[place + 1 :]), kwargs

    def _evaluate(
        self, optimizer: Optimizer, closure: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._closures += 1
        try:
            loss = closure(*args, **kwargs)
        except BaseException:
            self._depth.clear()
            raise
        finally:
            self._closures -= 1
        self._prepare(optimizer)
        return loss

    def _prepare(self, optimizer: Optimizer) -> None:
        try:
            self.before(optimizer)
        except BaseException:
            self._depth.clear()
            raise

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[optimizer] = max(self._depth.get(optimizer, 1) - 1, 0)
        if self._depth[optimizer]:
            return
        overflow = self.scaled and fused_overflow(optimizer)
        moved = not overflow and any(p.grad is not None for p in parameters_of(optimizer))
        steps, taken = self.progress[optimizer]
        self.progress[optimizer] = (steps + 1, taken + moved)
        self._stepped.add(optimizer)
        self.after(overflow)
