"""Lightning: a callback that filters on one device and under DDP, and a DDP strategy that brings it along."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaf.device.accumulate import Accumulator
from gaf.integrations.options import check_b, check_names, check_options
from gaf.integrations.trackers import metrics
from gaf.ranks.attach import attach
from gaf.ranks.handle import Handle
from gaf.record.gate import gate
from gaf.rules.contract import Policy, check_policy


class GAFCallback(pl.Callback):
    """Filters what a Trainer averages. The LightningModule stays as it is.

        trainer = Trainer(accumulate_grad_batches=8, callbacks=[GAFCallback(gaf.GAF(tau=0.9))])       # one device
        trainer = Trainer(strategy="ddp", devices=8, callbacks=[GAFCallback(gaf.GAF(tau=0.9))])

    On one device the rows are the micro-batches of `accumulate_grad_batches`, by a `gaf.Accumulator`. Under DDP they are
    the ranks, by `gaf.attach`; what a rank accumulates is its row. Clipping and `on_before_optimizer_step` see the update.
    A skip leaves parameters, optimizer state and schedulers with interval="step" alone, and counts in `global_step`.
    Checkpoints carry counts and the policy's state. The numbers of `gaf.integrations.trackers.metrics` are logged at every step.

    Where a macro-batch is short, at the end of an epoch or because `training_step` returned None, Lightning divides its sum by
    `accumulate_grad_batches` all the same; on one device the update here is the mean over those that there are. Micro-batches
    whose gradients Lightning clears before a step, as where the module's `optimizer_step` runs the closure alone, count for
    nothing here either. A checkpoint in the middle of a macro-batch holds the
    counts of the last step: its micro-gradients are lost to a run that goes on from there, as Lightning's own are.

    Args:
        policy: `gaf.GAF(...)`, or any other that `gaf.Accumulator` or `gaf.attach` takes.
        b: samples per row, for the unit of the noise scale. With 1, it counts rows.
        options: of `gaf.Accumulator` on one device (bn, leave_out), of `gaf.attach` under DDP (micro_group).

    Attributes:
        decider: the Accumulator or the Handle, from the start of `fit` on; `.last` is the last Decision.

    Raises:
        TypeError, ValueError: for a wrong policy, b or option; when `fit` starts, for manual optimization, for other
            strategies, and for an option that belongs to the other kind of rows; with what to do instead.
    """

    def __init__(self, policy: Policy, *, b: float = 1, **options: Any) -> None:
        check_names(options, "GAFCallback")
        self.policy, self.b = check_policy(policy, "GAFCallback"), check_b(b, "GAFCallback")
        self.options = options
        self.decider: Accumulator | Handle | None = None
        self._steps: Steps | None = None
        self._one: OneDevice | None = None
        self._logged = 0  # steps, when metrics were logged last
        # Lightning restores callbacks before there is an optimizer
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._one = None  # of a fit before
        check(trainer, pl_module)
        check_options(self.options, "GAFCallback", ranks=isinstance(trainer.strategy, DDPStrategy))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if isinstance(trainer.strategy, DDPStrategy):
            assert trainer.strategy.model is not None
            self.decider = attach(
                trainer.strategy.model,
                trainer.optimizers,
                self.policy,
                scaler=scaler,
                **self.options,
            )
            self._steps = Steps(trainer.strategy)
        else:
            self.decider = Accumulator(
                trainer.optimizers, self.policy, model=pl_module, scaler=scaler, **self.options
            )
            self._steps = self._one = OneDevice(trainer, pl_module, self.decider)
        for config in trainer.lr_scheduler_configs:
            if is_per_step(config):
                gate(config.scheduler, Progress(self.decider, self._steps, config.scheduler))
        if self._loaded is not None:
            self.decider.load_state_dict(self._loaded)
            self._loaded = None
        self._logged = self.decider.ledger.telemetry.totals["steps"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._one is not None:
            self._one.acc.discard()  # of an epoch that was broken off

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._one is not None and self._one.rows and not self._one.acc.stats()["steps"]:
            warnings.warn(f"gaf: {self._one.rows} micro-gradients came in this epoch, and no step was asked for: optimizer_step() of "
                          f"{type(pl_module).__name__} must call optimizer.step(closure) of the optimizer that it is given.",
                          stacklevel=2)  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.decider is None or self._logged == (
            steps := self.decider.ledger.telemetry.totals["steps"]
        ):
            return
        self._logged = steps
        pl_module.log_dict(metrics(self.decider, self.b))

    def state_dict(self) -> dict[str, Any]:
        if self.decider is None:
            return self._loaded or {}
        return self._one.settled() if self._one is not None else self.decider.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._steps is not None:
            self._steps.restore()
        if isinstance(self.decider, Handle):
            self.decider.detach()


class Steps:
    """Stands in for a strategy's optimizer step, and counts, until `restore`.

    Attributes:
        asked: steps that there was something to decide on for; a module may clear gradients without asking for one.
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
    """Stands in for the backward pass too: the Accumulator's.

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
        self._before = self.settled()
        super().restore()
        self.acc._give_way()  # a step that an exception kept from being taken does not count

    def settled(self) -> dict[str, Any]:
        """The state after the last step."""
        return self._before if self.acc.waiting or not self._replaced else self.acc.state_dict()

    def zero_grad(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """An optimizer's: micro-gradients that wait are gradients, and go too."""
        original(*args, **kwargs)
        if self.acc.waiting and self.acc._decided is None:
            self.acc.discard()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None) -> Tensor:
        """One row. Lightning has divided the loss by the number of micro-batches; the Accumulator scales it."""
        precision, k = self.trainer.precision_plugin, self.trainer.accumulate_grad_batches
        if self.acc._rows is not None and len(self.acc._rows) >= k:
            raise RuntimeError(f"GAFCallback: a macro-batch must be accumulate_grad_batches = {k} micro-batches; optimizer_step() or "
                               f"optimizer_zero_grad() of {type(self.module).__name__} gathers more. Set the Trainer's "
                               "accumulate_grad_batches instead.")  # fmt: skip
        self._before = self.settled()
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
            raise TypeError(f"GAFCallback: on one device optimizer.step must be given a closure alone; got {', '.join(kwargs)}. "
                            "Leave it out.")  # fmt: skip
        result, precision = closure(), self.trainer.precision_plugin
        if not self.acc.waiting:  # every training_step gave None: Lightning steps without gradients
            return precision.optimizer_step(optimizer, model=self.module, closure=lambda: result)
        self.asked += 1
        self.acc.decide()
        precision._after_closure(self.module, optimizer)
        self.acc.step()
        return result


class Progress:
    """What a gate asks. Lightning moves a scheduler after every batch that ends a macro-batch, also where no step was asked for:
    there was no skip then, and the scheduler moves as it would without a filter."""

    def __init__(self, decider: Accumulator | Handle, steps: Steps, scheduler: LRScheduler) -> None:
        self.steps, self.seen, self.idle = steps, -1, 0
        self.progress: Callable[[], tuple[int, int]] = (
            decider.steps.progress_of(scheduler)
            if isinstance(decider, Handle)
            else lambda: decider.ledger.progress
        )

    def __call__(self) -> tuple[int, int]:
        self.idle += self.steps.asked == self.seen
        self.seen = self.steps.asked
        decided, taken = self.progress()
        return decided + self.idle, taken + self.idle


class GAFDDPStrategy(DDPStrategy):
    """Lightning's DDP with a GAFCallback: Trainer(strategy=GAFDDPStrategy(gaf.GAF(tau=0.9)), devices=8).

    Args:
        policy: as for `GAFCallback`.
        b: as for `GAFCallback`.
        micro_group: as for `gaf.attach`.
        options: of Lightning's DDPStrategy. Its `ddp_comm_hook`, which Lightning ignores on a CPU, excludes filtering.
    """

    def __init__(
        self, policy: Policy, *, b: float = 1, micro_group: int = 1, **options: Any
    ) -> None:
        super().__init__(**options)
        self.callback = GAFCallback(policy, b=b, micro_group=micro_group)

    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        callbacks: list[pl.Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
        if self.callback not in callbacks:
            callbacks.insert(0, self.callback)


def is_per_step(config: Any) -> bool:
    """Whether a scheduler moves with the steps, of which a skip is one less."""
    return config.interval == "step" and not config.reduce_on_plateau


def check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """What would go past the decision."""
    strategy = trainer.strategy
    if sum(isinstance(one, GAFCallback) for one in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError("GAFCallback: there must be one; the Trainer has several (GAFDDPStrategy brings its own). Leave the others "
                         "out.")  # fmt: skip
    if not module.automatic_optimization:
        raise ValueError("GAFCallback: the module must use automatic optimization; automatic_optimization is False. There use "
                         "gaf.Accumulator, or under DDP gaf.attach(self.trainer.strategy.model, self.trainer.optimizers, policy) in "
                         "on_fit_start.")  # fmt: skip
    if type(strategy) is not SingleDeviceStrategy and not isinstance(strategy, DDPStrategy):
        raise TypeError("GAFCallback: the strategy must be lightning.pytorch's DDP or a single device; got "
                        f"{full_name(strategy)}. Use strategy='ddp'; for FSDP2, gaf.attach in a loop of your own.")  # fmt: skip
    if any(isinstance(one, _MockOptimizer) for one in trainer.optimizers):
        raise ValueError("GAFCallback: configure_optimizers must return an optimizer; got None, so there is no step to decide on. "
                         "Return one, or leave the callback out.")  # fmt: skip
    if isinstance(strategy, SingleDeviceStrategy):
        check_one_device(trainer, module)
    for config in filter(is_per_step, trainer.lr_scheduler_configs):
        check_scheduler(config)


def check_one_device(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """The Accumulator stands in for the backward pass and the step: nobody else may."""
    if is_overridden("backward", module):
        raise TypeError(f"GAFCallback: on one device the backward pass is the Accumulator's; {type(module).__name__} has a backward() of "
                        "its own. Leave it out.")  # fmt: skip
    kind: Any = type(trainer.precision_plugin)
    if kind.backward is not Precision.backward or kind.optimizer_step not in (
        Precision.optimizer_step,
        MixedPrecision.optimizer_step,
    ):
        raise TypeError("GAFCallback: on one device the backward pass and the step are the Accumulator's; the precision plugin "
                        f"{full_name(trainer.precision_plugin)} has its own. Use one of Lightning's precisions.")  # fmt: skip


def check_scheduler(config: Any) -> None:
    if not isinstance(config.scheduler, LRScheduler):
        raise TypeError("GAFCallback: a scheduler with interval='step' must be a torch.optim.lr_scheduler.LRScheduler, so that it can "
                        f"stand still on a skip; got {full_name(config.scheduler)}. Use interval='epoch', or one of torch's.")  # fmt: skip
    if config.frequency != 1:
        raise ValueError("GAFCallback: a scheduler with interval='step' must have frequency 1, so that it can stand still on a skip; "
                         f"got {config.frequency}. Put the frequency into the scheduler.")  # fmt: skip


def full_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
