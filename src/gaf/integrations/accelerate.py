"""Accelerate: one call after `prepare`; the loop stays as it is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import gaf
from gaf.device.accumulate import Accumulator
from gaf.device.parameters import all_parameters
from gaf.device.scaler import has_gradients
from gaf.integrations.options import check_options
from gaf.ranks.handle import Handle
from gaf.rules.contract import Policy, check_policy

SUBJECT = "accelerate.attach"
INSTEAD = {
    "create_graph": "Micro-gradients are kept as numbers. For a gradient penalty take torch.autograd.grad(..., create_graph=True) "
    "and add the penalty to the loss.",
    "gradient": "Give a scalar loss: (loss * gradient).sum().",
    "inputs": "Freeze the parameters that are to get no gradient with requires_grad_(False).",
    "learning_rate": "An optimizer that steps in the backward pass (LOMO) leaves nothing to decide on: use another.",
}


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy,
    **options: Any,
) -> "MicroBatches | Handle":
    """Filters what a loop of Accelerate's averages.

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        handle = gaf.integrations.accelerate.attach(accelerator, model, optimizer, gaf.GAF(tau=0.9))

    In one process the rows are the micro-batches of `gradient_accumulation_steps`; in several they are the ranks, and what
    a rank accumulates is its row. After the last micro-batch's `accelerator.backward` p.grad holds the update, to clip and
    to look at. A skip leaves parameters and optimizer state alone and counts as `optimizer_step_was_skipped`, so that prepared
    schedulers stand still. `accelerator.save_state` carries counts and the policy's state; save between macro-batches.

    In one process the update is the mean over the accepted micro-batches of those that there were; Accelerate itself divides
    by `gradient_accumulation_steps` also where an epoch's last macro-batch is short. `accelerator.backward` takes retain_graph there,
    and no other option. An `optimizer.zero_grad()` that Accelerate carries out drops the micro-gradients that wait, as it would
    without a filter: call it after `optimizer.step()`.

    Args:
        accelerator: whose loop it is.
        model: what `accelerator.prepare` gave.
        optimizer: the same; several share one decision.
        policy: `gaf.GAF(...)`, or any other that `gaf.Accumulator` or `gaf.attach` takes.
        options: of `gaf.Accumulator` in one process (bn, leave_out), of `gaf.attach` in several (micro_group).

    Returns:
        What decides: `.last`, `.stats()`, `.detach()`.

    Raises:
        TypeError, ValueError, RuntimeError: where filtering cannot work (DeepSpeed, FSDP, Megatron-LM, XLA,
            sync_each_batch), and for a wrong argument or an option of the other kind of rows, with what to do instead.
    """
    prepared = check_kinds(accelerator, model, optimizer)
    check_policy(policy, SUBJECT)
    check_options(options, SUBJECT, ranks=accelerator.distributed_type != DistributedType.NO)
    check(accelerator, model, prepared)
    inner = [one.optimizer for one in prepared]
    decider: MicroBatches | Handle
    if accelerator.distributed_type == DistributedType.NO:
        decider = MicroBatches(
            accelerator, inner, policy, model=accelerator.unwrap_model(model), **options
        )
    else:
        decider = gaf.attach(model, inner, policy, scaler=accelerator.scaler, **options)
    for one in prepared:
        one.__class__, one.decider = Gated, decider
        decider.on_detach(partial(setattr, one, "__class__", AcceleratedOptimizer))
    accelerator.register_for_checkpointing(decider)
    decider.on_detach(partial(forget, accelerator, decider))
    return decider


def forget(accelerator: Accelerator, decider: Any) -> None:
    """Checkpoints carry it no longer."""
    accelerator._custom_objects = [one for one in accelerator._custom_objects if one is not decider]


class MicroBatches(Accumulator):
    """The Accumulator of one process: Accelerate says when a macro-batch ends, clips, and steps.

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
        """One row, in place of `accelerator.backward`; the last of a macro-batch decides and leaves the update in p.grad.

        Args:
            loss: scalar, as for Accelerate's.
            options: retain_graph; others only with the values that torch has by default.

        Raises:
            RuntimeError: where the update before is still there, or was not stepped on.
            TypeError: for what is no tensor, and for other options.
        """
        check_loss(loss)
        retain_graph = check_backward(options)
        self._check_ended()
        super().backward(loss * self.divisor(), retain_graph=retain_graph)
        if self.accelerator.sync_gradients:
            self.ledger.last, self._decided = self.decide(), None
            self._due = set(self.optimizers)

    def _check_ended(self) -> None:
        """The macro-batch before."""
        if self.waiting:
            return
        if any(p.grad is not None for p in all_parameters(self.optimizers)):
            raise RuntimeError(f"{SUBJECT}: p.grad must be empty when a macro-batch begins; it holds an update or a gradient from "
                               "elsewhere. Call optimizer.zero_grad() after optimizer.step(), and leave accumulation to "
                               "Accelerator(gradient_accumulation_steps=k) and accelerator.accumulate(model).")  # fmt: skip
        if len(self._due) == len(self.optimizers):  # a skip leaves p.grad empty too
            raise RuntimeError(f"{SUBJECT}: a macro-batch must end with optimizer.step(); accelerator.backward(loss) came once more after "
                               "the decision. Add up the losses of a micro-batch, and call it once.")  # fmt: skip

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        past = optimizer not in self._due and has_gradients(optimizer)
        if self.outcome is None or past:
            raise RuntimeError(f"{SUBJECT}: every loss must go through accelerator.backward(loss); a step came, and none had. "
                               "Use it in place of loss.backward().")  # fmt: skip
        self._due.discard(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        """Also where a scaler held the step back."""
        self._due.discard(optimizer)

    def after_zero_grad(self, optimizer: Optimizer) -> None:
        """Gradients were cleared, and micro-gradients that wait are gradients."""
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


class Gated(AcceleratedOptimizer):  # type: ignore[misc]
    """An optimizer that tells schedulers of skips as of overflows."""

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


def check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{SUBJECT}: accelerator.backward must be given the loss as a tensor; got {type(loss).__name__}. "
                        "Give it one scalar.")  # fmt: skip


def check_backward(options: dict[str, Any]) -> bool:
    """Of accelerator.backward in one process, where torch's backward is the Accumulator's: whether the graph is kept."""
    for name, value in options.items():
        if name != "retain_graph" and value is not None and value is not False:
            raise TypeError(f"{SUBJECT}: in one process accelerator.backward must be given retain_graph at most; got {name}. "
                            f"{INSTEAD.get(name, 'Leave it out.')}")  # fmt: skip
    return bool(options.get("retain_graph"))


def check_kinds(accelerator: Any, model: Any, optimizer: Any) -> list[Any]:
    """The optimizers, as a list."""
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"{SUBJECT}: the first argument must be accelerate's Accelerator; got {type(accelerator).__name__}. "
                        "Call attach(accelerator, model, optimizer, policy).")  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"{SUBJECT}: the model must be a module, as accelerator.prepare gave it; got {type(model).__name__}. "
                        "Call attach(accelerator, model, optimizer, policy).")  # fmt: skip
    if not isinstance(optimizer, Optimizer | list | tuple):
        raise TypeError(f"{SUBJECT}: the optimizer must be what accelerator.prepare gave, or a list of such; got "
                        f"{type(optimizer).__name__}. Call attach(accelerator, model, optimizer, policy).")  # fmt: skip
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def check(accelerator: Accelerator, model: nn.Module, optimizers: list[Any]) -> None:
    """What would go past the decision."""
    for one in optimizers:
        if not isinstance(one, AcceleratedOptimizer):
            raise TypeError(f"{SUBJECT}: the optimizer must be what accelerator.prepare gave; got {type(one).__name__}. "
                            "Attach after prepare.")  # fmt: skip
        if isinstance(one, Gated):
            raise RuntimeError(
                f"{SUBJECT}: the optimizer must not be attached already; it is. Call detach() on what attach gave."
            )
    kind, alone = accelerator.distributed_type, accelerator.distributed_type == DistributedType.NO
    if not alone and not isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel):
        raise TypeError(f"{SUBJECT}: the model must be prepared, in one process or for DistributedDataParallel; got "
                        f"{type(model).__name__} under {kind}. DeepSpeed, FSDP, Megatron-LM and XLA reduce the gradients before anyone "
                        "can look: choose plain data parallelism (for FSDP2, gaf.attach in a loop of your own).")  # fmt: skip
    if not alone and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise ValueError(f"{SUBJECT}: in several processes sync_each_batch must be False; with True, a rank's gradients would mix "
                         "with the update of the micro-batches before. Leave it out.")  # fmt: skip
    others = [
        type(one.optimizer).__name__
        for one in accelerator._optimizers
        if all(one is not given for given in optimizers)
    ]
    if alone and others:
        raise ValueError(f"{SUBJECT}: in one process every prepared optimizer must be given, for accelerator.backward then serves "
                         f"those alone; missing: {', '.join(others)}. Give them all as a list.")  # fmt: skip
