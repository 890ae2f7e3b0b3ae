"""Lightning: a callback that filters on one device and under DDP, and a DDP strategy with it."""

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from gaf.device.accumulate import Accumulator
from gaf.integrations.lightning_checks import check_one_callback, check_trainer, is_per_step
from gaf.integrations.lightning_steps import OneDevice, Progress, Steps
from gaf.integrations.options import check_b, check_names, check_options
from gaf.integrations.trackers import metrics
from gaf.ranks.attach import attach
from gaf.ranks.handle import Handle
from gaf.record.gate import gate
from gaf.rules.contract import Policy, check_policy


class GAFCallback(pl.Callback):
    """Filters what a Trainer averages. The LightningModule stays as it is.

        callback = GAFCallback(gaf.GAF(tau=0.9))
        trainer = Trainer(accumulate_grad_batches=8, callbacks=[callback])       # one device
        trainer = Trainer(strategy="ddp", devices=8, callbacks=[callback])

    On one device the rows are the micro-batches of `accumulate_grad_batches`, by a
    `gaf.Accumulator`. Under DDP they are the ranks, by `gaf.attach`; what a rank accumulates is its
    row. Clipping and `on_before_optimizer_step` see the update. A skip leaves parameters, optimizer
    state and schedulers with interval="step" alone, and counts in `global_step`. Checkpoints carry
    counts and the policy's state. The numbers of `gaf.integrations.trackers.metrics` are logged at
    every step.

    A macro-batch can be short: at the end of an epoch, or because `training_step` returned None.
    Lightning still divides its sum by `accumulate_grad_batches`; on one device the update here is
    the mean over the micro-batches that there are. Lightning may clear gradients before a step, as
    when the module's `optimizer_step` runs only the closure; those micro-batches do not count here
    either. A checkpoint in the middle of a macro-batch holds the counts of the last step. A run
    that resumes from it loses the micro-gradients of that macro-batch, as it loses Lightning's own.

    Args:
        policy: `gaf.GAF(...)`, or any other that `gaf.Accumulator` or `gaf.attach` takes.
        b: samples per row, for the unit of the noise scale. With 1, it counts rows.
        options: of `gaf.Accumulator` on one device (bn, leave_out), of `gaf.attach` under DDP
            (micro_group).

    Attributes:
        decider: the Accumulator or the Handle, from the start of `fit` on; `.last` is the last
            Decision.

    Raises:
        TypeError, ValueError: for a wrong policy, b or option; when `fit` starts, for manual
            optimization, for other strategies, and for an option that belongs to the other kind of
            rows; with what to do instead.
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
        self._one = None  # left over from an earlier fit
        check_one_callback(trainer, GAFCallback)
        check_trainer(trainer, pl_module)
        strategy, optimizers = trainer.strategy, trainer.optimizers
        check_options(self.options, "GAFCallback", ranks=isinstance(strategy, DDPStrategy))
        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **self.options}
        if isinstance(strategy, DDPStrategy):
            assert strategy.model is not None
            self.decider = attach(strategy.model, optimizers, self.policy, **options)
            self._steps = Steps(strategy)
        else:
            self.decider = Accumulator(optimizers, self.policy, model=pl_module, **options)
            self._steps = self._one = OneDevice(trainer, pl_module, self.decider)
        for config in filter(is_per_step, trainer.lr_scheduler_configs):
            gate(config.scheduler, Progress(self.decider, self._steps, config.scheduler))
        if self._loaded is not None:
            self.decider.load_state_dict(self._loaded)
            self._loaded = None
        self._logged = self._decided_steps()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._one is not None:
            self._one.acc.discard()  # left over from an interrupted epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._one is not None and self._one.rows and not self._one.acc.stats()["steps"]:
            warnings.warn(
                f"gaf: {self._one.rows} micro-gradients came in this epoch, and no step was asked "
                f"for: optimizer_step() of {type(pl_module).__name__} must call "
                "optimizer.step(closure) of the optimizer that it is given.",
                stacklevel=2,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.decider is not None and self._logged != self._decided_steps():
            self._logged = self._decided_steps()
            pl_module.log_dict(metrics(self.decider, self.b))

    def _decided_steps(self) -> int:
        assert self.decider is not None
        return self.decider.ledger.telemetry.totals["steps"]

    def state_dict(self) -> dict[str, Any]:
        if self.decider is None:
            return self._loaded or {}
        return self.decider.state_dict() if self._one is None else self._one.settled_state()

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


class GAFDDPStrategy(DDPStrategy):
    """Lightning's DDP with a GAFCallback.

        trainer = Trainer(strategy=GAFDDPStrategy(gaf.GAF(tau=0.9)), devices=8)

    Args:
        policy: as for `GAFCallback`.
        b: as for `GAFCallback`.
        micro_group: as for `gaf.attach`.
        options: of Lightning's DDPStrategy. Its `ddp_comm_hook`, which Lightning ignores on a CPU,
            excludes filtering.
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
