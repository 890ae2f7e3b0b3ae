"""Lightning: a callback that filters on one device and under DDP, and a DDP strategy that brings it along."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from gaf.accumulate import Accumulator
from gaf.attach import attach
from gaf.combine import Policy
from gaf.handle import Handle
from gaf.integrations.trackers import metrics


class GAFCallback(pl.Callback):
    """Filters what a Trainer averages. The LightningModule stays as it is.

        trainer = Trainer(accumulate_grad_batches=8, callbacks=[GAFCallback(gaf.GAF(tau=0.9))])       # one device
        trainer = Trainer(strategy="ddp", devices=8, callbacks=[GAFCallback(gaf.GAF(tau=0.9))])

    On one device the rows are the micro-batches of `accumulate_grad_batches`, by a `gaf.Accumulator`. Under DDP they are
    the ranks, by `gaf.attach`; what a rank accumulates is its row. Clipping and `on_before_optimizer_step` see the update.
    A skip leaves parameters, optimizer state and schedulers with interval="step" alone, and counts in `global_step`.
    Checkpoints carry counts and the policy's state. The numbers of `gaf.integrations.trackers.metrics` are logged at every step.

    Where an epoch's last macro-batch is short, Lightning divides its sum by `accumulate_grad_batches` all the same; on one
    device the update here is the mean over those that there are. A checkpoint in the middle of a macro-batch holds the
    counts of the last step: its micro-gradients are lost to a run that goes on from there, as Lightning's own are.

    Args:
        policy: `gaf.GAF(...)`, or any other that `gaf.Accumulator` or `gaf.attach` takes.
        b: samples per row, for the unit of the noise scale. With 1, it counts rows.
        options: of `gaf.Accumulator` on one device (bn, leave_out), of `gaf.attach` under DDP (micro_group).

    Attributes:
        decider: the Accumulator or the Handle, from the start of `fit` on; `.last` is the last Decision.

    Raises:
        TypeError, ValueError: when `fit` starts, for manual optimization and for other strategies, with what to do instead.
    """

    def __init__(self, policy: Policy, *, b: float = 1, **options: Any) -> None:
        self.policy, self.b, self.options = policy, b, options
        self.decider: Accumulator | Handle | None = None
        self._one: OneDevice | None = None
        # Lightning restores callbacks before there is an optimizer
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check(trainer, pl_module)
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
        else:
            self.decider = Accumulator(
                trainer.optimizers, self.policy, model=pl_module, scaler=scaler, **self.options
            )
            self._one = OneDevice(trainer, pl_module, self.decider)
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                self.decider.gate(config.scheduler)
        if self._loaded is not None:
            self.decider.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._one is not None:
            self._one.acc.discard()  # of an epoch that was broken off

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.decider is not None:
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
        if self._one is not None:
            self._one.restore()
        elif isinstance(self.decider, Handle):
            self.decider.detach()


class OneDevice:
    """Stands in for a strategy's backward pass and optimizer step, until `restore`."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, acc: Accumulator) -> None:
        self.trainer, self.module, self.acc = trainer, module, acc
        self._before = acc.state_dict()
        vars(trainer.strategy).update(backward=self.backward, optimizer_step=self.optimizer_step)

    def restore(self) -> None:
        for name in ("backward", "optimizer_step"):
            vars(self.trainer.strategy).pop(name, None)

    def settled(self) -> dict[str, Any]:
        """The state after the last step."""
        return self._before if self.acc.waiting else self.acc.state_dict()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None) -> Tensor:
        """One row. Lightning has divided the loss by the number of micro-batches; the Accumulator scales it."""
        precision = self.trainer.precision_plugin
        self._before = self.settled()
        # its hooks, without a subclass's scaling
        Precision.pre_backward(precision, closure_loss, self.module)
        self.acc.backward(closure_loss * self.trainer.accumulate_grad_batches)
        return precision.post_backward(closure_loss, self.module)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """The last micro-batch, the decision, hooks and clipping, a step or none."""
        result = closure()
        if self.acc.waiting:  # not where every training_step gave None
            self.acc.decide()
            self.trainer.precision_plugin._after_closure(self.module, optimizer)
            self.acc.step()
        return result


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


def check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """What would go past the decision."""
    strategy = trainer.strategy
    kind = f"{type(strategy).__module__}.{type(strategy).__qualname__}"
    if not module.automatic_optimization:
        raise ValueError("GAFCallback: the module must use automatic optimization; automatic_optimization is False. There use "
                         "gaf.Accumulator, or under DDP gaf.attach(self.trainer.strategy.model, self.trainer.optimizers, policy) in "
                         "on_fit_start.")  # fmt: skip
    if type(strategy) is not SingleDeviceStrategy and not isinstance(strategy, DDPStrategy):
        raise TypeError(f"GAFCallback: the strategy must be lightning.pytorch's DDP or a single device; got {kind}. Use strategy='ddp'; "
                        "for FSDP2, gaf.attach in a loop of your own.")  # fmt: skip
    if isinstance(strategy, SingleDeviceStrategy) and is_overridden("backward", module):
        raise TypeError(f"GAFCallback: on one device the backward pass is the Accumulator's; {type(module).__name__} has a backward() of "
                        "its own. Leave it out.")  # fmt: skip
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and not config.reduce_on_plateau and config.frequency != 1:
            raise ValueError("GAFCallback: a scheduler with interval='step' must have frequency 1, so that it can stand still on a skip; "
                             f"got {config.frequency}. Put the frequency into the scheduler.")  # fmt: skip
