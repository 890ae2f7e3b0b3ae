"""Steps launched many at a time: the engine "device".

What the host needs of the steps is fetched once for many of them, then reported one by one.
See docs/engine.md.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

import gaf
from gaf.record.ledger import Ledger
from gaf.rules.contract import Policy
from gaf_lab.data.run_data import RunData
from gaf_lab.training.device_step import DeviceStep
from gaf_lab.training.objective import Objective
from gaf_lab.training.restart import restart_step
from gaf_lab.training.tables import AHEAD, Tables, draws
from gaf_lab.training.turns import Turns


class Captured:
    """A step as a CUDA graph: each call repeats the captured work, on the current stream.

    Each graph is captured on its own stream. Libraries keep a workspace for each stream, and graphs
    that run at the same time must not share one.
    """

    def __init__(self, step: DeviceStep) -> None:
        here, stream = torch.cuda.current_stream(step.device), torch.cuda.Stream(step.device)
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            step.warm_up()
        with torch.cuda.graph(self.graph, stream=stream):
            step()
        here.wait_stream(stream)

    def __call__(self) -> None:
        self.graph.replay()


def capture(step: DeviceStep) -> Callable[[], None]:
    """The step as a graph, if its device has graphs. Its tables are filled: it is warmed up."""
    return Captured(step) if step.device.type == "cuda" else step


class OnDevice:
    """Drop-in for gaf.Accumulator that launches many steps at once and reports them one by one.

    Args:
        problem, model, objective, policy, average: as for `DeviceStep`.
        optimizer: as the run has it without this engine. It never steps itself. Steps use its
            learning rate, which a schedule moves, and it holds the state that they change.
        make: makes a fused optimizer like it.

    Attributes:
        outcome: of the step reported last.
    """

    averages = True

    def __init__(
        self,
        problem: RunData,
        model: nn.Module,
        objective: Objective,
        policy: Policy,
        optimizer: Optimizer,
        make: Callable[[list[nn.Parameter]], Optimizer],
        average: AveragedModel | None = None,
    ) -> None:
        self.config, self.problem, self.optimizer = problem.config, problem, optimizer
        self.turns = 1
        self.ledger = Ledger(policy)
        self.policy: Any = self.ledger.policy
        fused = make(list(model.parameters()))
        self.one = DeviceStep(problem, model, objective, self.policy, fused, average)
        # the log of steps that were fetched and not yet reported
        self.waiting: deque[list[float]] = deque()
        self._call: Callable[[], None] | None = None
        self._draws: dict[int, Tables] = {}  # by step, made while the device works
        self._launched = range(0)
        self._restart = restart_step(problem) if problem.config.audit_passes else None
        self._share_optimizer_state()

    @property
    def outcome(self) -> gaf.Outcome | None:
        return self.ledger.outcome

    def ready(self, step: int, last: int, rates: Callable[[int], list[float]]) -> Turns[None]:
        """Launches the steps up to the next evaluation, unless `step` has been launched already."""
        if self.waiting:
            return
        ahead = self._steps_ahead(step, last)
        self.launch(ahead, rates(len(ahead)))
        yield
        self.fetch()

    def _steps_ahead(self, step: int, last: int) -> range:
        """The steps from here to the next evaluation, a restart or the end; at most AHEAD."""
        for end in range(step + 1, step + AHEAD):
            if self.problem.evaluation(end) or end in (last, self._restart):
                return range(step, end)
        return range(step, step + AHEAD)

    def launch(self, steps: range, rates: Sequence[float]) -> None:
        """Starts steps, at most `AHEAD`, and does not wait for them.

        Args:
            steps: their numbers in the run.
            rates: learning rates, one for each step that the schedule counts.
        """
        rows = [self._draws.pop(t, {}) or draws(self.problem, t) for t in steps]
        tables = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        tables["rates"] = torch.tensor(rates, dtype=torch.float32)
        if self.one.planned:
            weights = [self.policy.planned(t, self.config.k) for t in steps]
            tables["weights"] = torch.tensor(weights, dtype=torch.float64)
        self.one.fill(tables)
        if self._call is None:
            self._call = capture(self.one)
        for _ in steps:
            self._call()
        self._launched = steps

    def fetch(self) -> None:
        """Waits for the launched steps, and makes the next tables meanwhile."""
        end = self._launched.stop
        for t in range(end, min(end + AHEAD, self.problem.steps)):
            if t not in self._draws:
                self._draws[t] = draws(self.problem, t)
        self.waiting.extend(self.one.log[: len(self._launched)].tolist())

    def micro_gradients(self, step: int) -> Tensor:
        """The losses (k,), on the CPU, of the next step to report. It has been taken."""
        return torch.tensor(self.waiting[0][-self.config.k :])

    @torch.no_grad()
    def forget(self, optimizer: Optimizer) -> None:
        """As `GradientSource.forget`: zeros are what a first step finds. Captures anew."""
        for values in optimizer.state.values():
            for value in values.values():
                value.zero_()
        self._call = None

    def step(self) -> None:
        """Reports the next step: counts it, as an Accumulator does when it takes one."""
        entry = self.waiting.popleft()[: -self.config.k]
        self.ledger.record(gaf.Outcome.unpack(entry))
        if self.one.planned:
            self.policy.step += 1

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        return self.ledger.gate(scheduler)

    def stats(self, b: float = 1) -> dict[str, Any]:
        return self.ledger.stats(b)

    def state_dict(self) -> dict[str, Any]:
        """As an Accumulator's."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes an Accumulator's state. The optimizer's has been loaded before."""
        self.ledger.load_state_dict(state)
        self._share_optimizer_state()

    @torch.no_grad()
    def _share_optimizer_state(self) -> None:
        """Copies the optimizer's state, perhaps loaded, to the memory that the steps change."""
        state = self.one.optimizer.state
        for p, values in self.optimizer.state.items():
            for name, value in values.items():
                if value is not state[p][name]:
                    state[p][name].copy_(value)
        self.optimizer.state = state
