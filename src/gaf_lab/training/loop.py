"""One training run in memory: the loop, and everything that changes in it.

data -> micro-batch -> micro-gradient -> decision -> step or skip -> evaluation -> records
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gaf
from gaf_lab.data.check_task import check_trains
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.sampling import derive_seed
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.diverged import check_losses
from gaf_lab.training.evaluate import measure
from gaf_lab.training.interval import Interval
from gaf_lab.training.listener import Listener
from gaf_lab.training.make import (
    check_rows,
    learning_rate,
    make_policy,
    make_training_engine,
    pick_device,
)
from gaf_lab.training.objective import make_objective
from gaf_lab.training.optimizers import evaluated_weights, make_optimizer
from gaf_lab.training.over_ranks import check_same_on_ranks
from gaf_lab.training.ranks import ALONE, Group
from gaf_lab.training.restart import start_again_if_due
from gaf_lab.training.schedule import Schedule
from gaf_lab.training.techniques import EarlyStopping, ema_model
from gaf_lab.training.turns import Turns


class Training:
    """Everything that changes while a run goes on, and the loop that changes it."""

    def __init__(self, config: TrainConfig, data_folder: Path | None, group: Group = ALONE) -> None:
        self.config, self.group = config, group
        self.device = group.each(lambda: pick_device(config.device, group))
        given = config, data_folder, self.device, group.world
        self.problem = group.each(lambda: make_run_data(*given))
        check_same_on_ranks(self.problem, group)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.model = self.problem.new_model()
        check_trains(self.model)
        self.average = ema_model(self.model, config.ema) if config.ema else None
        self.objective = make_objective(self.problem, self.model)
        self.stopping = EarlyStopping(config.early_stopping) if config.early_stopping else None
        policy, rate = group.on_rank_0(lambda: (make_policy(config), learning_rate(config)))
        group.on_rank_0(lambda: check_rows(config, policy, self.model, self.device))
        make = partial(make_optimizer, config, rate)
        self.optimizer = make(list(self.model.parameters()))
        self.schedule = Schedule(config, self.optimizer, self.problem.steps)
        parts = self.problem, self.model, self.objective, policy, self.optimizer, make, group
        self.accumulator, self.source = make_training_engine(*parts, self.average)
        if self.schedule.per_step is not None and config.schedule_waits:
            self.accumulator.gate(self.schedule.per_step)
        self.step, self.seconds, self.interval = 0, 0.0, Interval.empty(self.device)

    def run(
        self, folder: Path, listener: Listener, steps: int | None, keep_checkpoints: bool
    ) -> Turns[str]:
        """Trains to the end, or to step `steps`. Returns the status of the end line.

        It gives way to other runs while the device works on launched steps.

        Raises:
            Diverged: if every loss of a step is NaN or infinite.
        """
        last = min(self.problem.steps, steps or self.problem.steps)
        listener.begin(self.problem, self.step, last)
        while self.step < last and not self.over:
            started = time.perf_counter()
            start_again_if_due(self)
            yield from self.source.ready(self.step, last, self.schedule.next_rates)
            outcome = self.macro_batch()
            self.interval.seconds += time.perf_counter() - started
            listener.stepped(self.step, outcome)
            if self.problem.evaluation(self.step) or self.step == last:
                line = self.evaluation()
                self.group.on_rank_0(partial(self._keep, line, folder, listener, keep_checkpoints))
        return "finished" if last == self.problem.steps or self.over else "stopped"

    @property
    def over(self) -> bool:
        return self.stopping is not None and self.stopping.over

    def _keep(
        self, line: dict[str, Any], folder: Path, listener: Listener, keep_checkpoints: bool
    ) -> None:
        records.append(folder, line)
        if keep_checkpoints:
            checkpoint.save(folder, self.state_dict(folder))
        listener.evaluated(line)

    def macro_batch(self) -> gaf.Outcome:
        """k micro-gradients, or as many as agree; one decision, a step or none."""
        start_again_if_due(self)
        losses = self.source.micro_gradients(self.step)
        self.interval.losses += losses.sum()
        check_losses(losses, self.step, self.config.k, self.group)
        self.accumulator.step()
        outcome = self.accumulator.outcome
        assert outcome is not None
        if self.average is not None and outcome.stepped and not self.source.averages:
            self.average.update_parameters(self.model)
        self.schedule.after_step(self.source.turns)
        self.step += self.source.turns
        self.interval.add(outcome)
        return outcome

    def evaluation(self) -> dict[str, Any]:
        """The line of records that closes an interval; moves a plateau schedule on."""
        started = time.perf_counter()
        with evaluated_weights(self.optimizer):
            measured = self._measure()
        stats = self.accumulator.stats(self.config.b)
        self.schedule.after_evaluation(self.problem.evaluation(self.step), measured)
        self.seconds += self.interval.seconds + time.perf_counter() - started
        samples = self.step * self.config.k * self.config.b
        line = {
            "kind": "eval",
            "step": self.step,
            "steps_taken": stats["stepped"],
            "samples": samples,
            "passes": samples / len(self.problem.train),
            "seconds": self.seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.interval.line(self.config.b, self.group.total(float(self.interval.losses))),
            "noise_scale": stats["noise_scale"],
            "norm_dispersion": stats["norm_dispersion"],
            **self.objective.findings(),
            **measured,
        }
        self.interval = Interval.empty(self.device)
        return line

    def _measure(self) -> dict[str, Any]:
        """Evaluates the model, or its average; at the end of early stopping, the best weights."""
        model = self.model if self.average is None else self.average.module
        own = None if self.average is None else self.model
        look = partial(measure, model, own, self.problem)
        measured = self.group.on_rank_0(look)
        ended = self.step == self.problem.steps
        if self.stopping is None or not (ended or self.problem.evaluation(self.step)):
            return measured
        score = self.problem.score
        self.stopping.look(score.rank(score.of(measured, "heldout") or 0.0), model)
        if not (ended or self.over):
            return measured
        self.stopping.put_back(model)
        return self.group.on_rank_0(look)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and the size of the records so far."""
        return {
            "config_hash": self.config.hash,
            "data": self.problem.checksum,
            "step": self.step,
            "seconds": self.seconds,
            "records_size": (folder / records.FILE).stat().st_size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "accumulator": self.accumulator.state_dict(),
            "objective": self.objective.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "stopping": None if self.stopping is None else self.stopping.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to that point. A state of one process fits k ranks, and the other way round."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        self.accumulator.load_state_dict(state["accumulator"])
        self.objective.load_state_dict(state.get("objective", {}))  # older checkpoints have none
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.stopping is not None:
            self.stopping.load_state_dict(state["stopping"])
        torch.set_rng_state(state["random"])
