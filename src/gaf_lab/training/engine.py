"""A step that never waits for the host: data, augmentation, decision, step or skip on the device, on CUDA as one captured graph.

tables (made ahead on the host) -> k micro-gradients -> Gram -> decision -> w^T G -> fused optimizer, told to skip -> log

The decisions are the library's own, taken on tensors. What a step needs from the host it reads from `gaf_lab.training.tables`, and what the
host wants to know it writes into a log that is fetched once for many steps. See docs/engine.md.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import gaf
from gaf.device.backward import unshared
from gaf.device.rows import Stacked, Streamed, rows_on_device
from gaf.record.ledger import Ledger
from gaf.record.telemetry import packed
from gaf.rules.contract import Policy, is_planned, tau_given
from gaf.rules.decision import Evidence
from gaf.rules.judging import streams
from gaf.rules.thresholds import Threshold
from gaf_lab.data.augment import affine, shift
from gaf_lab.data.problem import Problem
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.controls import as_planned
from gaf_lab.training.tables import Tables, draws, empty
from gaf_lab.training.techniques import Objective

AHEAD = 64  # steps for which tables are made, and after which the log is fetched at the latest
WARM_UP = 3  # steps before a capture: libraries make their plans and workspaces in them


def obstacle(config: TrainConfig, world: int = 1) -> str | None:
    """Why this engine cannot run a config: a message that names the field, what it must be, and its value; None where it can."""
    needs = {
        "dataset": (config.dataset != "imagenet", "must fit into the device's memory"),
        "optimizer": (
            config.optimizer != "rmsprop",
            "must have a fused form, which skips without asking the host",
        ),
        "mixup": (not config.mixup, "must be 0"),
        "sam": (not config.sam, "must be 0"),
        "ema": (not config.ema, "must be 0"),
        "bn": (config.bn == "all", "must be 'all'"),
        "scope": (config.scope == "all" or config.policy != "gaf", "must be 'all'"),
        "compile": (not config.compile, "must be off"),
    }
    for name, (holds, requirement) in needs.items():
        if not holds:
            return f"{name} {requirement} for engine 'device'; got {getattr(config, name)!r}."
    return (
        f"engine must not be 'device' on several ranks; got it on {world}." if world > 1 else None
    )


def check(config: TrainConfig, world: int) -> None:
    """ConfigError where the config asks for this engine by name, and it cannot run it."""
    found = obstacle(config, world)
    if config.engine == "device" and found is not None:
        raise ConfigError(f"{found} Use --engine plain.")


def chosen(config: TrainConfig, device: torch.device, world: int) -> bool:
    """Whether this engine is to run the config: where it is asked for, and under "auto" on CUDA wherever it can."""
    return config.engine == "device" or (
        config.engine == "auto" and device.type == "cuda" and obstacle(config, world) is None
    )


class DeviceStep:
    """One macro-batch, from the tables' current row to the log's, and on to the next row. A call never waits for the device.

    Args:
        config, problem, model, objective: of the run. The problem's pictures and labels are on the device.
        policy: decides; where it has a method `planned`, what that gave is in the tables.
        optimizer: a fused one over the model's parameters, without state; its learning rate is taken over.

    Attributes:
        tables: `AHEAD` rows of each kind.
        at, taken: (1,) int64, steps decided and steps taken since the tables were filled.
        log: (AHEAD, 5 k + 3) float64, of each step what `gaf.telemetry.packed` says, and the k losses.
    """

    def __init__(
        self,
        config: TrainConfig,
        problem: Problem,
        model: nn.Module,
        objective: Objective,
        policy: Policy,
        optimizer: Optimizer,
    ) -> None:
        self.config, self.problem, self.model, self.objective, self.optimizer = (
            config,
            problem,
            model,
            objective,
            optimizer,
        )
        self.device = problem.train.observed.device
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.planned = is_planned(policy)
        self.streams, self.policy = streams(policy), gaf.Mean() if self.planned else policy
        self.tables = empty(AHEAD, config, self.planned, self.device)
        self.at, self.taken = (
            torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(2)
        )
        self.rate = torch.zeros((), device=self.device)
        self.log = torch.zeros(AHEAD, 5 * config.k + 3, dtype=torch.float64, device=self.device)
        prepare(optimizer, self.rate)
        # in a cache, which may forget what a graph reads
        self.constants = affine(problem.data.mean, problem.data.std, self.device)

    def __call__(self) -> None:
        rows = self._rows()
        losses = [self.micro_gradient(i, rows) for i in range(self.config.k)]
        with torch.no_grad():
            decision, evidence = self.decide(rows)
            for p, grad in zip(self.params, rows.combined(decision.weights), strict=True):
                p.grad = grad.to(p.dtype)
            self.optimizer.found_inf = (~decision.stepped).float()  # type: ignore[attr-defined]
            self.rate.copy_(
                self.row("rates", self.taken if self.config.schedule_waits else self.at)
            )
            self.optimizer.step()
            self.optimizer.zero_grad()
            entry = torch.cat([packed(decision, evidence), torch.stack(losses).double()])
            self.log.index_copy_(0, self.at, entry[None])
            self.at += 1
            self.taken += decision.stepped

    def _rows(self) -> Streamed | Stacked:
        voters = [True] * len(self.params)
        return (
            rows_on_device(self.policy, voters, self.device)
            if self.streams
            else Stacked(self.policy, voters)
        )

    def micro_gradient(self, i: int, rows: Streamed | Stacked) -> Tensor:
        """Micro-batch i's gradient goes to the rows; its loss () is returned."""
        x, index = self.pictures(i)
        with torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.autocast == "bfloat16",
            cache_enabled=False,
        ):
            scores = self.model(self.problem.inputs(x)).float()
            loss = self.objective.of(scores, self.problem.train.observed[index], index)
        torch.autograd.backward(loss, inputs=self.params)
        for j, p in enumerate(self.params):
            grad, p.grad = p.grad, None
            assert grad is not None
            rows.take(j, unshared(grad))
        with torch.no_grad():
            rows.add()
        return loss.detach()

    def pictures(self, i: int) -> tuple[Tensor, Tensor]:
        """Micro-batch i of the current step: pictures (b, C, H, W) uint8, augmented, and which samples they are, (b,)."""
        index = self.row("index", self.at)[i]
        assert isinstance(self.problem.train.x, Tensor)
        x = self.problem.train.x[index]
        return (shift(x, self.row("shifts", self.at)[i]) if self.config.augment else x), index

    def decide(self, rows: Streamed | Stacked) -> tuple[gaf.Decision, Evidence]:
        decision, evidence = rows.decide()
        return (
            as_planned(self.row("weights", self.at), decision.distances)
            if self.planned
            else decision
        ), evidence

    def row(self, name: str, number: Tensor) -> Tensor:
        return self.tables[name].index_select(0, number)[0]

    def fill(self, tables: Tables) -> None:
        """Takes tables of at most `AHEAD` steps, and begins with their first row."""
        for name, table in tables.items():
            held = table.pin_memory() if self.device.type == "cuda" else table
            self.tables[name][: len(table)].copy_(held, non_blocking=True)
        self.at.zero_()
        self.taken.zero_()

    def state(self) -> list[Tensor]:
        """All tensors that a call changes."""
        moments = [
            value
            for p in self.params
            for value in self.optimizer.state[p].values()
            if isinstance(value, Tensor)
        ]
        model = [*self.model.parameters(), *self.model.buffers()]
        tau = tau_given(self.policy)
        learned = [tau.state_on(self.device)] if isinstance(tau, Threshold) else []
        return [
            *model,
            *moments,
            *learned,
            *self.objective.state_dict().values(),
            self.at,
            self.taken,
            self.rate,
            self.log,
        ]

    def warm_up(self) -> None:
        """Takes some steps, and takes back all that they changed."""
        with torch.no_grad():
            kept = [t.clone() for t in self.state()]
        for _ in range(WARM_UP):
            self()
        with torch.no_grad():
            for t, was in zip(self.state(), kept, strict=True):
                t.copy_(was)


def prepare(optimizer: Optimizer, rate: Tensor) -> None:
    """Makes the state that a first step would make, and reads the learning rate from a tensor () float32.

    A first step that is skipped leaves fused SGD's momentum uninitialised. Zeros are what SGD without dampening, Adam and AdamW
    begin with.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
        names = (
            ("exp_avg", "exp_avg_sq")
            if "betas" in group
            else ("momentum_buffer",)
            if group["momentum"]
            else ()
        )
        for p in group["params"]:
            optimizer.state[p] = {
                name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names
            }
            if "betas" in group:
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)


class Captured:
    """A step as a CUDA graph: what it did on the device while it was captured is done again by each call, on the current stream.

    Each graph is captured on a stream of its own, for libraries keep a workspace for each stream, and graphs that run at the same
    time must not share one.
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


class OnDevice:
    """Has the methods of gaf.Accumulator, except that steps are launched many at a time, and then told of one by one.

    Args:
        config, problem, model, objective, policy: as for `DeviceStep`.
        optimizer: as the run without this engine has it. Its learning rate, which a schedule moves, is what steps are taken with, and
            it holds the state that they move; it never steps itself.
        make: a fused optimizer like it.

    Attributes:
        outcome, losses: of the step that was told of last; losses (k,) on the CPU.
    """

    def __init__(
        self, config: TrainConfig, problem: Problem, model: nn.Module, objective: Objective, policy: Any,
        optimizer: Optimizer, make: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:  # fmt: skip
        self.config, self.problem, self.optimizer = config, problem, optimizer
        self.ledger = Ledger(policy)
        self.policy: Any = self.ledger.policy
        self.one = DeviceStep(
            config, problem, model, objective, self.policy, make(list(model.parameters()))
        )
        self.losses = torch.zeros(0)
        # the log of steps that were fetched and not yet reported
        self.waiting: deque[list[float]] = deque()
        self._call: Callable[[], None] | None = None
        self._draws: dict[int, Tables] = {}  # by step, made while the device was at work
        self._launched = range(0)
        self.restored()

    @property
    def outcome(self) -> gaf.Outcome | None:
        return self.ledger.outcome

    def launch(self, steps: range, rates: Sequence[float]) -> None:
        """Starts steps, at most `AHEAD`, and does not wait for them.

        Args:
            steps: their numbers in the run.
            rates: learning rates, of which a step reads the first, the second, ... as the schedule counts steps.
        """
        if self._call is None:
            self._call = Captured(self.one) if self.one.device.type == "cuda" else self.one
        rows = [self._draws.pop(t) if t in self._draws else draws(self.problem, t) for t in steps]
        tables = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        tables["rates"] = torch.tensor(rates, dtype=torch.float32)
        if self.one.planned:
            tables["weights"] = torch.tensor(
                [self.policy.planned(t, self.config.k) for t in steps], dtype=torch.float64
            )
        self.one.fill(tables)
        for _ in steps:
            self._call()
        self._launched = steps

    def fetch(self) -> None:
        """Waits for the steps that were launched, and uses the time."""
        end = self._launched.stop
        for t in range(end, min(end + AHEAD, self.problem.steps)):
            if t not in self._draws:
                self._draws[t] = draws(self.problem, t)
        self.waiting.extend(self.one.log[: len(self._launched)].tolist())

    def step(self) -> None:
        """Tells of the next step: counts it, as an Accumulator does when it takes one."""
        entry, k = self.waiting.popleft(), self.config.k
        self.losses = torch.tensor(entry[-k:])
        self.ledger.record(gaf.Outcome.unpacked(entry[:-k]))
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
        self.ledger.load_state_dict(state)

    @torch.no_grad()
    def restored(self) -> None:
        """Takes over the optimizer's state, which may have been loaded, in the memory that the steps work on."""
        state = self.one.optimizer.state
        for p, values in self.optimizer.state.items():
            for name, value in values.items():
                if value is not state[p][name]:
                    state[p][name].copy_(value)
        self.optimizer.state = state
