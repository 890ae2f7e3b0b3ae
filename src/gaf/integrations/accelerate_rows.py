"""Accelerate in one process: its micro-batches as rows, and its optimizers with a gate."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from gaf.device.accumulate import Accumulator
from gaf.device.parameters import all_parameters
from gaf.device.scaler import has_gradients
from gaf.ranks.handle import Handle
from gaf.rules.contract import Policy

SUBJECT = "accelerate.attach"
INSTEAD = {
    "create_graph": "Micro-gradients are kept as numbers. For a gradient penalty take "
    "torch.autograd.grad(..., create_graph=True) and add the penalty to the loss.",
    "gradient": "Give a scalar loss: (loss * gradient).sum().",
    "inputs": "Freeze the parameters that are to get no gradient with requires_grad_(False).",
    "learning_rate": "An optimizer that steps in the backward pass (LOMO) leaves nothing to decide "
    "on: use another.",
}


class MicroBatches(Accumulator):
    """The Accumulator of one process: Accelerate ends macro-batches, clips, and steps.

    Attributes:
        divisor: what the loop has divided the loss by before it comes to `accelerator.backward`.
    """

    def __init__(
        self, accelerator: Accelerator, optimizers: list[Optimizer], policy: Policy, **options: Any
    ) -> None:
        super().__init__(optimizers, policy, scaler=accelerator.scaler, **options)
        self.accelerator = accelerator
        self.divisor: Callable[[], float] = lambda: 1.0
        self._due: set[Optimizer] = set()  # to be stepped, now that a decision was taken
        accelerator.backward = self.backward
        self._undo: list[Callable[[], None]] = [lambda: vars(accelerator).pop("backward")]
        if self.scaler is not None:  # decide() has unscaled the update
            accelerator.unscale_gradients = lambda optimizer=None: None
            self._undo.append(lambda: vars(accelerator).pop("unscale_gradients"))
        self._undo += [one.register_step_pre_hook(self._before_step).remove for one in optimizers]

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Adds one row, in place of `accelerator.backward`.

        The last row of a macro-batch decides and leaves the update in p.grad.

        Args:
            loss: scalar, as for Accelerate's.
            options: retain_graph; others only with the values that torch has by default.

        Raises:
            RuntimeError: where the last update is still there, or was not stepped on.
            TypeError: for what is no tensor, and for other options.
        """
        check_loss_is_tensor(loss)
        retain_graph = check_backward(options)
        self._check_ended()
        super().backward(loss * self.divisor(), retain_graph=retain_graph)
        if self.accelerator.sync_gradients:
            self.ledger.last, self._decided = self.decide(), None
            self._due = set(self.optimizers)

    def _check_ended(self) -> None:
        """RuntimeError where the last macro-batch is not over."""
        if self.waiting:
            return
        if any(p.grad is not None for p in all_parameters(self.optimizers)):
            raise RuntimeError(
                f"{SUBJECT}: p.grad must be empty when a macro-batch begins; it holds an update or "
                "a gradient from elsewhere. Call optimizer.zero_grad() after optimizer.step(), and "
                "leave accumulation to Accelerator(gradient_accumulation_steps=k) and "
                "accelerator.accumulate(model)."
            )
        if len(self._due) == len(self.optimizers):  # a skip leaves p.grad empty too
            raise RuntimeError(
                f"{SUBJECT}: a macro-batch must end with optimizer.step(); "
                "accelerator.backward(loss) came once more after the decision. Add up the losses "
                "of a micro-batch, and call it once."
            )

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        undecided = optimizer not in self._due and has_gradients(optimizer)
        if self.outcome is None or undecided:
            raise RuntimeError(
                f"{SUBJECT}: every loss must go through accelerator.backward(loss); a step came, "
                "and none had. Use it in place of loss.backward()."
            )
        self._due.discard(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after a step, also if a scaler held it back."""
        self._due.discard(optimizer)

    def after_zero_grad(self, optimizer: Optimizer) -> None:
        """Called after gradients were cleared: micro-gradients that wait are gradients too."""
        self._due.discard(optimizer)
        if self.waiting:
            self.discard()

    def on_detach(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def detach(self) -> None:
        """Leaves plain accumulation behind. Micro-gradients that wait are dropped."""
        if self.waiting:
            self.discard()
        while self._undo:
            self._undo.pop()()


class FilteredOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """A prepared optimizer that reports skips to schedulers as it reports overflows.

    `attach` makes this the class of an optimizer that exists, because loops and schedulers hold
    the object itself.
    """

    decider: MicroBatches | Handle

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step(closure)
        if isinstance(self.decider, MicroBatches) and self.gradient_state.sync_gradients:
            self.decider.after_step(self.optimizer)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        super().zero_grad(set_to_none)
        if isinstance(self.decider, MicroBatches) and self.gradient_state.sync_gradients:
            self.decider.after_zero_grad(self.optimizer)

    @property
    def step_was_skipped(self) -> bool:
        return super().step_was_skipped or not self._moved()

    def _moved(self) -> bool:
        if isinstance(self.decider, Handle):
            return self.decider.moves
        return self.decider.outcome is None or self.decider.outcome.stepped


def check_loss_is_tensor(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{SUBJECT}: accelerator.backward must be given the loss as a tensor; got "
            f"{type(loss).__name__}. Give it one scalar."
        )


def check_backward(options: dict[str, Any]) -> bool:
    """Whether accelerator.backward is to keep the graph.

    Raises:
        TypeError: for any other option, because torch's backward is the Accumulator's here.
    """
    for name, value in options.items():
        if name != "retain_graph" and value is not None and value is not False:
            raise TypeError(
                f"{SUBJECT}: in one process accelerator.backward must be given retain_graph at "
                f"most; got {name}. {INSTEAD.get(name, 'Leave it out.')}"
            )
    return bool(options.get("retain_graph"))
