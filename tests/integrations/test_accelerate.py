"""Accelerate against a loop written out by hand, and against itself without a filter; in one process and on two ranks."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import BATCH, STEPS, K, close, flat, follow, mean_loss, network, samples
from ranks import Ranks
from torch.amp import GradScaler
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import gaf
from gaf.integrations.trackers import metrics

pytest.importorskip("accelerate")
from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DistributedType, GradientAccumulationPlugin  # noqa: E402

from gaf.integrations.accelerate import attach  # noqa: E402

ROOT = Path(__file__).parents[2]
TAU = 0.85  # some steps are taken, some are not


@pytest.fixture(autouse=True)
def _fresh() -> None:
    AcceleratorState._reset_state(True)


class Loop:
    """The loop of Accelerate's documentation; `policy` adds the one line."""

    def __init__(self, policy: Any = None, k: int = K, count: int = STEPS * K * BATCH, clip: float = float("inf"), **options: Any) -> None:
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k, **options)
        self.clip, model = clip, network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        parts = (model, optimizer, DataLoader(TensorDataset(*samples(count)), batch_size=BATCH), StepLR(optimizer, 1, 0.97))
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(*parts)
        self.handle: Any = None if policy is None else attach(self.accelerator, self.model, self.optimizer, policy)
        self.taken: list[bool] = []

    def run(self, start: int = 0, stop: int | None = None) -> "Loop":
        """Some of the epoch's batches."""
        for batch in list(self.loader)[start:stop]:
            self.micro(batch)
        return self

    def whole(self) -> "Loop":
        for batch in self.loader:
            self.micro(batch)
        return self

    def micro(self, batch: Any) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(mean_loss(self.model, batch))
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            if self.accelerator.sync_gradients:
                self.taken.append(not self.accelerator.optimizer_step_was_skipped)
            self.scheduler.step()
            self.optimizer.zero_grad()

    def state(self) -> Any:
        states = (self.optimizer.state_dict(), self.scheduler.state_dict())
        return copy.deepcopy((flat(self.model), *states))


def by_hand(policy: Any, count: int, clip: float = float("inf"), loss: Any = mean_loss) -> tuple[Any, Any, list[bool]]:
    """The same in one process: each batch is a row."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler = StepLR(optimizer, 1, 0.97)
    batches = list(DataLoader(TensorDataset(*samples(count)), batch_size=BATCH))
    steps = [[[batch] for batch in batches[i : i + K]] for i in range(0, len(batches), K)]
    taken = follow(model, optimizer, scheduler, steps, policy, clip, loss)
    return model, scheduler, taken


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list | tuple) else bool(a == b)


# ------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("policy", [gaf.GAF(TAU), gaf.GAF(TAU, start="best"), gaf.GAF(2.0)], ids=["first", "best", "all"])
@pytest.mark.parametrize("clip", [float("inf"), 0.4])
def test_micro_batches_are_rows_and_the_last_macro_batch_may_be_short(policy, clip):
    count = (STEPS * K + 2) * BATCH
    loop = Loop(policy, count=count, clip=clip).whole()
    model, scheduler, taken = by_hand(policy, count, clip)
    close(loop.model, model)
    assert loop.taken == taken and len(taken) == STEPS + 1
    assert loop.scheduler.get_last_lr() == scheduler.get_last_lr()
    assert policy.tau == 2 or set(taken) == {True, False}


def test_all_rows_are_what_accelerate_does():
    close(Loop(gaf.GAF(2.0)).whole().model, Loop().whole().model)
