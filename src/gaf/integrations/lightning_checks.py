"""What `GAFCallback` refuses when `fit` starts."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.lr_scheduler import LRScheduler


def check_one_callback(trainer: pl.Trainer, kind: type[pl.Callback]) -> None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(one, kind) for one in callbacks) > 1:
        raise ValueError(
            "GAFCallback: there must be one; the Trainer has several (GAFDDPStrategy brings its "
            "own). Leave the others out."
        )


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuses setups in which gradients would bypass the filter."""
    strategy = trainer.strategy
    if not module.automatic_optimization:
        raise ValueError(
            "GAFCallback: the module must use automatic optimization; automatic_optimization is "
            "False. There use gaf.Accumulator, or under DDP "
            "gaf.attach(self.trainer.strategy.model, self.trainer.optimizers, policy) in "
            "on_fit_start."
        )
    if type(strategy) is not SingleDeviceStrategy and not isinstance(strategy, DDPStrategy):
        raise TypeError(
            "GAFCallback: the strategy must be lightning.pytorch's DDP or a single device; got "
            f"{full_name(strategy)}. Use strategy='ddp'; for FSDP2, gaf.attach in a loop of your "
            "own."
        )
    if any(isinstance(one, _MockOptimizer) for one in trainer.optimizers):
        raise ValueError(
            "GAFCallback: configure_optimizers must return an optimizer; got None, so there is no "
            "step to decide on. Return one, or leave the callback out."
        )
    if isinstance(strategy, SingleDeviceStrategy):
        check_one_device(trainer, module)
    for config in filter(is_per_step, trainer.lr_scheduler_configs):
        check_scheduler(config)


def check_one_device(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuses other code for the backward pass and the step, which are the Accumulator's."""
    if is_overridden("backward", module):
        raise TypeError(
            "GAFCallback: on one device the backward pass is the Accumulator's; "
            f"{type(module).__name__} has a backward() of its own. Leave it out."
        )
    kind: Any = type(trainer.precision_plugin)
    known_steps = (Precision.optimizer_step, MixedPrecision.optimizer_step)
    if kind.backward is not Precision.backward or kind.optimizer_step not in known_steps:
        raise TypeError(
            "GAFCallback: on one device the backward pass and the step are the Accumulator's; the "
            f"precision plugin {full_name(trainer.precision_plugin)} has its own. "
            "Use one of Lightning's precisions."
        )


def check_scheduler(config: Any) -> None:
    if not isinstance(config.scheduler, LRScheduler):
        raise TypeError(
            "GAFCallback: a scheduler with interval='step' must be a "
            "torch.optim.lr_scheduler.LRScheduler, so that it can pause on a skip; got "
            f"{full_name(config.scheduler)}. Use interval='epoch', or one of torch's."
        )
    if config.frequency != 1:
        raise ValueError(
            "GAFCallback: a scheduler with interval='step' must have frequency 1, so that it can "
            f"pause on a skip; got {config.frequency}. Put the frequency into the scheduler."
        )


def is_per_step(config: Any) -> bool:
    """Whether a scheduler moves with the steps, and so not with skips."""
    return config.interval == "step" and not config.reduce_on_plateau


def full_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
