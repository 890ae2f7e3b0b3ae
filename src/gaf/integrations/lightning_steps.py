"""Replaces a strategy's backward pass and step while `fit` runs, and counts steps for gates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaf.device.accumulate import Accumulator
from gaf.ranks.handle import Handle


class Steps:
    """Replaces a strategy's optimizer step, and counts, until `restore`.

    Attributes:
        asked: steps for which there was something to decide on. A module may clear gradients
            without such a step.
    """

    def __init__(self, strategy: Any) -> None:
        self.asked, self._step = 0, strategy.optimizer_step
        self._replaced: list[Any] = []
        self._replace(strategy, optimizer_step=self.optimizer_step)

    def _replace(self, thing: Any, **methods: Any) -> None:
        vars(thing).update(methods)
        self._replaced += [(thing, name) for name in methods]

    def restore(self) -> None:
        """Gives Lightning's own methods back."""
        while self._replaced:
            thing, name = self._replaced.pop()
            vars(thing).pop(name, None)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return self._step(*args, **kwargs)


class OneDevice(Steps):
    """Replaces the backward pass too, by the Accumulator's.

    Attributes:
        rows: micro-gradients seen.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, acc: Accumulator) -> None:
        super().__init__(trainer.strategy)
        self.trainer, self.module, self.acc, self.rows = trainer, module, acc, 0
        self._before = acc.state_dict()
        self._replace(trainer.strategy, backward=self.backward)
        optimizers: list[Any] = [*trainer.optimizers, *trainer.strategy._lightning_optimizers]
        for one in optimizers:
            self._replace(one, zero_grad=partial(self.zero_grad, one.zero_grad))

    def restore(self) -> None:
        """Gives Lightning's own methods back. Micro-gradients that wait are dropped."""
        self._before = self.settled_state()
        super().restore()
        self.acc._give_way()  # a step that an exception prevented does not count

    def settled_state(self) -> dict[str, Any]:
        """The state after the last step."""
        if self.acc.waiting or not self._replaced:
            return self._before
        return self.acc.state_dict()

    def zero_grad(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """An optimizer's zero_grad; drops micro-gradients that wait, because they are gradients."""
        original(*args, **kwargs)
        if self.acc.waiting and self.acc._decided is None:
            self.acc.discard()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None) -> Tensor:
        """Adds one row.

        Lightning has divided the loss by the number of micro-batches; the Accumulator scales it.
        """
        precision, k = self.trainer.precision_plugin, self.trainer.accumulate_grad_batches
        if self.acc._rows is not None and len(self.acc._rows) >= k:
            raise RuntimeError(
                f"GAFCallback: a macro-batch must be accumulate_grad_batches = {k} micro-batches; "
                f"optimizer_step() or optimizer_zero_grad() of {type(self.module).__name__} "
                "gathers more. Set the Trainer's accumulate_grad_batches instead."
            )
        self._before = self.settled_state()
        # its hooks, without a subclass's scaling
        Precision.pre_backward(precision, closure_loss, self.module)
        self.acc.backward(closure_loss * k)
        self.rows += 1
        return precision.post_backward(closure_loss, self.module)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """The last micro-batch, the decision, hooks and clipping, a step or none."""
        if kwargs:
            raise TypeError(
                "GAFCallback: on one device optimizer.step must be given a closure alone; got "
                f"{', '.join(kwargs)}. Leave it out."
            )
        result, precision = closure(), self.trainer.precision_plugin
        if not self.acc.waiting:  # every training_step gave None: Lightning steps without gradients
            return precision.optimizer_step(optimizer, model=self.module, closure=lambda: result)
        self.asked += 1
        self.acc.decide()
        precision._after_closure(self.module, optimizer)
        self.acc.step()
        return result


class Progress:
    """Steps decided and taken, as a scheduler's gate counts them.

    Lightning moves a scheduler after every batch that ends a macro-batch, also if no step was
    asked for. That is no skip: the scheduler then moves as it would without a filter.
    """

    def __init__(self, decider: Accumulator | Handle, steps: Steps, scheduler: LRScheduler) -> None:
        self.steps, self.seen, self.idle = steps, -1, 0
        self.progress: Callable[[], tuple[int, int]] = lambda: decider.ledger.progress
        if isinstance(decider, Handle):
            self.progress = decider.steps.progress_of(scheduler)

    def __call__(self) -> tuple[int, int]:
        self.idle += self.steps.asked == self.seen
        self.seen = self.steps.asked
        decided, taken = self.progress()
        return decided + self.idle, taken + self.idle
