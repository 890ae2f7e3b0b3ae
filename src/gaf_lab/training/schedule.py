"""The learning rate of a run, and how it changes."""

import copy
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, ReduceLROnPlateau

from gaf_lab.settings.config import TrainConfig


class Schedule:
    """A config's schedule, which changes the learning rate after each step or, on a plateau, later.

    Attributes:
        scheduler: torch's; None if the rate is constant.
        per_step: the same, if it counts steps; else None.
        plateau: the same, if it looks at evaluations; else None.
    """

    def __init__(self, config: TrainConfig, optimizer: Optimizer, steps: int) -> None:
        self.config, self.optimizer = config, optimizer
        self.scheduler = make_scheduler(config, optimizer, steps)
        on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        self.plateau = self.scheduler if on_plateau else None
        self.per_step = None if on_plateau else self.scheduler

    def next_rates(self, count: int) -> list[float]:
        """The next learning rates, as the schedule counts steps."""
        if self.per_step is None:
            return [self.optimizer.param_groups[0]["lr"]] * count
        return rates_ahead(self.per_step, count)

    def after_step(self, turns: int = 1) -> None:
        """turns: steps of the run that the optimizer's step has covered."""
        for _ in range(turns if self.per_step is not None else 0):
            assert self.per_step is not None
            with warnings.catch_warnings():
                # torch warns if the first steps are skipped
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.per_step.step()

    def after_evaluation(self, number: int | None, measured: dict[str, Any]) -> None:
        """number: of the evaluation, counted from 1; None for one that was not due."""
        if self.plateau is not None and number and number % self.config.plateau_every == 0:
            self.plateau.step(measured[f"{self.config.select_on}_loss"])

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)  # type: ignore[arg-type]


def make_scheduler(config: TrainConfig, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "multi-step":
        milestones = [round(m * steps) for m in config.milestones]
        return MultiStepLR(optimizer, milestones, gamma=config.gamma)
    if config.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=config.gamma, patience=config.patience)
    return None


def rates_ahead(scheduler: LRScheduler, count: int) -> list[float]:
    """The learning rate now and after each of the next count - 1 calls of the scheduler's step().

    The scheduler itself is not changed.
    """
    twin = copy.copy(scheduler)  # of a gated scheduler, one that is not gated
    group = scheduler.optimizer.param_groups[0]
    twin.optimizer = torch.optim.SGD([torch.zeros(1)], lr=group["lr"])
    twin.optimizer.param_groups[0]["initial_lr"] = group["initial_lr"]
    rates = [group["lr"]]
    with warnings.catch_warnings():
        # no optimizer steps here
        warnings.filterwarnings(
            "ignore", "(Detected call of `lr_scheduler|Seems like `optimizer).step"
        )
        for _ in range(count - 1):
            twin.step()
            rates.append(twin.optimizer.param_groups[0]["lr"])
    return rates
