"""A step that never waits for the host: everything up to the optimizer step is on the device.

tables (made ahead on the host) -> k micro-gradients -> Gram -> decision -> w^T G
    -> fused optimizer, which can skip -> log

The decisions are the library's own, taken on tensors. A step reads its inputs from the host out of
`gaf_lab.training.tables` and writes its outcome into a log. See docs/engine.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

import gaf
from gaf.device.packs import packs_for
from gaf.device.rows import StreamedRows, rows_without_waiting
from gaf.device.stacked import StackedRows
from gaf.record.outcome import pack
from gaf.rules.contract import Policy, given_tau, is_planned
from gaf.rules.decision import Evidence
from gaf.rules.judging import streams
from gaf.rules.thresholds import Threshold
from gaf_lab.data.problem import Augmentation
from gaf_lab.data.run_data import RunData
from gaf_lab.data.trees import rows_of, tensors_in, widen
from gaf_lab.training.controls import as_planned
from gaf_lab.training.objective import Objective
from gaf_lab.training.tables import AHEAD, Tables, zero_tables
from gaf_lab.training.techniques import update_on_device

WARM_UP = 3  # steps before a capture: libraries make their plans and workspaces in them


class DeviceStep:
    """One macro-batch: reads the tables' current row, writes the log's, and moves to the next row.

    A call never waits for the device.

    Args:
        problem, model, objective: of the run. Its inputs and targets are tensors on the device.
        policy: decides; if it has a method `planned`, the weights are in the tables.
        optimizer: a fused one over the model's parameters, without state; its learning rate is
            replaced by a tensor.
        average: of the model's weights; None for none.

    Attributes:
        tables: `AHEAD` rows of each kind.
        at, taken: (1,) int64, steps decided and steps taken since the tables were filled.
        log: (AHEAD, 5 k + 3) float64, for each step its outcome, packed, and the k losses.
    """

    def __init__(
        self,
        problem: RunData,
        model: nn.Module,
        objective: Objective,
        policy: Policy,
        optimizer: Optimizer,
        average: AveragedModel | None = None,
    ) -> None:
        config = problem.config
        self.config, self.problem = config, problem
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.average, self.device = average, problem.device
        if average is not None:
            average.n_averaged = average.n_averaged.to(self.device)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.planned = is_planned(policy)
        self.streams, self.policy = streams(policy), gaf.Mean() if self.planned else policy
        self.tables = zero_tables(AHEAD, problem, self.planned)
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.taken = torch.zeros_like(self.at)
        self.rate = torch.zeros((), device=self.device)
        self.log = torch.zeros(AHEAD, 5 * config.k + 3, dtype=torch.float64, device=self.device)
        prepare_optimizer(optimizer, self.rate)
        # constants that it needs are made before the first step
        problem.inputs(rows_of(problem.train.x, self.at))

    def __call__(self) -> None:
        rows = self._rows()
        losses = [self.micro_gradient(i, rows) for i in range(self.config.k)]
        with torch.no_grad():
            decision, evidence = self.decide(rows)
            for p, grad in zip(self.params, rows.update_on_device(decision.weights), strict=True):
                p.grad = grad.to(p.dtype)
            self.optimizer.found_inf = (~decision.stepped).float()  # type: ignore[attr-defined]
            now = self.taken if self.config.schedule_waits else self.at
            self.rate.copy_(self.row("rates", now))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                update_on_device(self.average, self.model, self.config.ema, decision.stepped)
            entry = torch.cat([pack(decision, evidence), torch.stack(losses).double()])
            self.log.index_copy_(0, self.at, entry[None])
            self.at += 1
            self.taken += decision.stepped

    def _rows(self) -> StreamedRows | StackedRows:
        voters = [True] * len(self.params)
        if self.streams:
            return rows_without_waiting(self.policy, voters, self.params)
        return StackedRows(self.policy, packs_for(self.params, voters))

    def micro_gradient(self, i: int, rows: StreamedRows | StackedRows) -> Tensor:
        """Passes the gradient of micro-batch i to the rows; returns its loss ()."""
        x, index = self.samples(i)
        bfloat16 = self.config.autocast == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, bfloat16, cache_enabled=False):
            output = widen(self.model(self.problem.inputs(x)))
            loss = self.objective.weighed(output, self.problem.train.labels[index], index, 0, i)
        torch.autograd.backward(loss, inputs=self.params)
        row = [p.grad for p in self.params]
        self.optimizer.zero_grad()
        with torch.no_grad():
            rows.add(row)
        return loss.detach()

    def samples(self, i: int) -> tuple[Any, Tensor]:
        """Micro-batch i of the step: inputs, augmented, and indices (b,)."""
        index = self.row("index", self.at)[i]
        x, augment = rows_of(self.problem.train.x, index), self.problem.problem.augment
        if isinstance(augment, Augmentation):
            x = augment.apply(x, self.row("augment", self.at)[i])
        return x, index

    def decide(self, rows: StreamedRows | StackedRows) -> tuple[gaf.Decision, Evidence]:
        decision, evidence = rows.decide()
        if self.planned:
            decision = as_planned(self.row("weights", self.at), decision.distances)
        return decision, evidence

    def row(self, name: str, number: Tensor) -> Tensor:
        return self.tables[name].index_select(0, number)[0]

    def fill(self, tables: Tables) -> None:
        """Copies tables of at most `AHEAD` steps, and starts at their first row."""
        for name, table in tables.items():
            source = table.pin_memory() if self.device.type == "cuda" else table
            self.tables[name][: len(table)].copy_(source, non_blocking=True)
        self.at.zero_()
        self.taken.zero_()

    def state(self) -> list[Tensor]:
        """All tensors that a call changes."""
        moments: list[Tensor] = []
        for p in self.params:
            values = self.optimizer.state[p].values()
            moments += [value for value in values if isinstance(value, Tensor)]
        model = [*self.model.parameters(), *self.model.buffers()]
        average = [] if self.average is None else list(self.average.state_dict().values())
        tau = given_tau(self.policy)
        learned = [tau.state_on(self.device)] if isinstance(tau, Threshold) else []
        of_samples = tensors_in(self.objective.state_dict())
        own = self.at, self.taken, self.rate, self.log
        return [*model, *moments, *average, *learned, *of_samples, *own]

    def warm_up(self) -> None:
        """Takes some steps, and restores everything that they changed."""
        with torch.no_grad():
            kept = [t.clone() for t in self.state()]
        for _ in range(WARM_UP):
            self()
        with torch.no_grad():
            for t, was in zip(self.state(), kept, strict=True):
                t.copy_(was)


def prepare_optimizer(optimizer: Optimizer, rate: Tensor) -> None:
    """Makes the state that a first step would make, and sets the learning rate to a tensor ().

    A skipped first step leaves fused SGD's momentum uninitialised. SGD without dampening, Adam and
    AdamW begin with zeros.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
        names = moment_names(group)
        for p in group["params"]:
            zeros = [torch.zeros_like(p, memory_format=torch.preserve_format) for _ in names]
            optimizer.state[p] = dict(zip(names, zeros, strict=True))
            if "betas" in group:
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)


def moment_names(group: dict[str, Any]) -> tuple[str, ...]:
    """The state of an Adam, AdamW or SGD optimizer that has the shape of a parameter."""
    if "betas" in group:
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if group["momentum"] else ()
