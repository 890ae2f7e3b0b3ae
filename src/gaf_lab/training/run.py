"""One training run, from a config to records: the loop, and what it takes to stop and go on.

data -> micro-batch -> micro-gradient -> decision -> step or skip -> evaluation -> records, checkpoint

The k micro-batches are computed by one process in turn, or by k ranks at once (`gaf_lab.training.parallel`); rank 0 evaluates and writes.
Steps are taken one by one by gaf.Accumulator, or launched many at a time (`gaf_lab.training.engine`).
"""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, ReduceLROnPlateau

import gaf
from gaf.rules.judging import streams
from gaf_lab.data.problem import Problem, make_problem
from gaf_lab.data.read_ahead import worker_died
from gaf_lab.data.sampling import derive_seed
from gaf_lab.records import checkpoint, environment
from gaf_lab.records import run as records
from gaf_lab.records.locks import check_free, own_folder
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training import engine, models, parallel
from gaf_lab.training.buckets import PerBucket
from gaf_lab.training.controls import RandomSubset, ReplaySkip
from gaf_lab.training.engine import AHEAD, OnDevice
from gaf_lab.training.evaluate import evaluate
from gaf_lab.training.parallel import Group
from gaf_lab.training.tables import rates_ahead
from gaf_lab.training.techniques import EarlyStopping, Forward, Objective, averaged, climbing

ALONE = Group()
THRESHOLDS: dict[str, tuple[Any, str]] = {  # by name, and what `threshold_by` is to it
    "signal": (gaf.SignalTau, "kappa"), "noise-floor": (gaf.NoiseFloorTau, "z"), "quantile": (gaf.QuantileTau, "p"),
    "moving-average": (gaf.MovingAverageTau, "margin"),
}  # fmt: skip
Stepper = gaf.Accumulator | parallel.OverRanks | OnDevice
LOOK_EVERY = 50  # steps between looks at the loss on an accelerator, each of which waits for it


class Listener(Protocol):
    """What follows a run: the console, TensorBoard, a test."""

    def begin(self, problem: Problem, step: int, steps: int) -> None: ...
    def stepped(self, step: int, outcome: gaf.Outcome) -> None: ...
    def evaluated(self, line: dict[str, Any]) -> None: ...


class Diverged(RuntimeError):
    """The loss is no longer a number."""


T = TypeVar("T")
Turns = Generator[None, None, T]  # what gives way at each yield, and ends with a T


def finished(turns: Turns[T]) -> T:
    """What comes of it, where there is nobody to give way to."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


@dataclass(eq=False)
class Interval:
    """What is gathered between two evaluations."""

    losses: Tensor
    rows: list[int]
    accepted: int = 0
    micro_gradients: int = 0
    distances: int = 0
    distance_sum: float = 0.0
    distance_min: float = math.nan
    signal: float = 0.0
    norm2: float = 0.0
    seconds: float = 0.0

    def add(self, outcome: gaf.Outcome) -> None:
        self.rows.append(sum(outcome.accepted))
        self.accepted += sum(outcome.accepted)
        self.micro_gradients += len(outcome.accepted)
        self.distances += len(outcome.compared)
        self.distance_sum += sum(outcome.compared)
        self.distance_min = min(
            [d for d in (self.distance_min, *outcome.compared) if not math.isnan(d)],
            default=math.nan,
        )
        norms2 = [norm2 for norm2 in outcome.norms2 if 0 < norm2 < math.inf]
        if norms2 and math.isfinite(outcome.signal):
            self.signal += outcome.signal
            self.norm2 += sum(norms2) / len(norms2)

    def line(self, b: int, loss: float) -> dict[str, Any]:
        """loss: the sum over the micro-batches of all ranks; `losses` has this rank's."""
        return {
            "train_loss": loss / self.micro_gradients,
            "acceptance": self.accepted / self.micro_gradients,
            "distance_mean": self.distance_sum / self.distances if self.distances else None,
            "distance_min": self.distance_min,
            "distance_pairs": 1 - self.signal / self.norm2 if self.norm2 else None,
            "samples_per_second": self.micro_gradients * b / self.seconds if self.seconds else None,
            "rows": self.rows,
        }


class Training:
    """Everything that changes while a run goes on, and the loop that changes it."""

    def __init__(self, config: TrainConfig, data_folder: Path | None, group: Group = ALONE) -> None:
        self.config, self.group = config, group
        self.device = group.each(lambda: pick_device(config.device, group))
        self.problem = group.each(
            lambda: make_problem(config, data_folder, self.device, group.world)
        )
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.model = models.build(
            config.model, self.problem.shape, self.problem.classes, config.stem
        ).to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = Objective(
            config, len(self.problem.train), self.problem.classes, self.device
        )
        self.average = averaged(self.model, config.ema) if config.ema else None
        self.stopping = EarlyStopping(config.early_stopping) if config.early_stopping else None
        policy, rate = group.led(lambda: (make_policy(config), learning_rate(config)))
        group.led(lambda: check_rows(config, policy, self.model, self.device))
        make = partial(make_optimizer, config, rate)
        self.optimizer = make(list(self.model.parameters()))
        self.scheduler = make_scheduler(config, self.optimizer, self.problem.steps)
        self.forward, self.accumulator = self._over_ranks(policy, make)
        self.plateau = self.scheduler if isinstance(self.scheduler, ReduceLROnPlateau) else None
        if self.scheduler is not None and self.plateau is None and config.schedule_waits:
            self.accumulator.gate(self.scheduler)
        self.step, self.seconds = 0, 0.0
        self.interval = self._new_interval()

    def _over_ranks(self, policy: Any, make: Callable[..., Optimizer]) -> tuple[Forward, Stepper]:
        """The model as it is trained, and what makes steps of its micro-gradients."""
        if self.group.world == 1:
            forward = torch.compile(self.model) if self.config.compile else self.model
            if engine.chosen(self.config, self.device, self.group.world):
                run = (self.config, self.problem, self.model, self.objective, policy)
                return forward, OnDevice(*run, self.optimizer, partial(make, fused=True))
            if self.config.policy == "gaf" and self.config.scope == "group":
                return forward, PerBucket(self.optimizer, policy, self.model)
            return forward, gaf.Accumulator(
                self.optimizer, policy, model=self.model, bn=self.config.bn
            )
        forward = parallel.data_parallel(
            self.model, self.group, *self.problem.micro_batch(0, self.group.rank)
        )
        return forward, parallel.OverRanks(forward, self.optimizer, policy)

    def run(
        self,
        folder: Path,
        listener: Listener,
        steps: int | None = None,
        keep_checkpoints: bool = True,
    ) -> str:
        """Trains to the end, or to step `steps`. Returns the status of the end line.

        Raises:
            Diverged: where every loss of a step is NaN or infinite.
        """
        return finished(self.run_in_turns(folder, listener, steps, keep_checkpoints))

    def run_in_turns(
        self, folder: Path, listener: Listener, steps: int | None, keep_checkpoints: bool
    ) -> Turns[str]:
        """The same, giving way to others while the device is at work on steps that were launched."""
        last = min(self.problem.steps, steps or self.problem.steps)
        listener.begin(self.problem, self.step, last)
        while self.step < last and not self.over:
            started = time.perf_counter()
            if isinstance(self.accumulator, OnDevice) and not self.accumulator.waiting:
                ahead = self._unwatched(last)
                self.accumulator.launch(ahead, self._rates(len(ahead)))
                yield
                self.accumulator.fetch()
            outcome = self.macro_batch()
            self.interval.seconds += time.perf_counter() - started
            listener.stepped(self.step, outcome)
            if self.problem.evaluation(self.step) or self.step == last:
                self.group.led(
                    partial(self._keep, self.evaluation(), folder, listener, keep_checkpoints)
                )
        return "finished" if last == self.problem.steps or self.over else "stopped"

    def _unwatched(self, last: int) -> range:
        """The steps from here to the next evaluation, or to the end; at most AHEAD."""
        for step in range(self.step + 1, self.step + AHEAD):
            if self.problem.evaluation(step) or step == last:
                return range(self.step, step)
        return range(self.step, self.step + AHEAD)

    def _rates(self, count: int) -> list[float]:
        """The next learning rates, as the schedule counts steps."""
        if self.scheduler is None or self.plateau is not None:
            return [self.optimizer.param_groups[0]["lr"]] * count
        return rates_ahead(self.scheduler, count)

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
        """k micro-gradients, one decision, a step or none."""
        if isinstance(self.accumulator, OnDevice):
            self.accumulator.step()
            self._look_at(self.accumulator.losses)
        else:
            self._look_at(
                torch.stack(
                    [self.micro_gradient(i) for i in self.group.micro_batches(self.config.k)]
                )
            )
            self.accumulator.step()
        outcome = self.accumulator.outcome
        assert outcome is not None
        if self.average is not None and outcome.stepped:
            self.average.update_parameters(self.model)
        if self.scheduler is not None and self.plateau is None:
            with warnings.catch_warnings():
                # so it is, where the first steps are skipped
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()
        self.step += 1
        self.interval.add(outcome)
        return outcome

    def micro_gradient(self, i: int) -> Tensor:
        """Micro-batch i's gradient goes to the accumulator; its loss is returned."""
        assert not isinstance(self.accumulator, OnDevice)
        x, y = self.problem.micro_batch(self.step, i)
        index = self.problem.index(self.step, i)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.autocast == "bfloat16"
        ):
            loss = self.objective(self.forward, x, y, index, self.step, i)
        if not self.config.sam:
            self.accumulator.backward(loss)
            return loss.detach()
        with climbing(self.model, loss, self.config.sam):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.config.autocast == "bfloat16"
            ):
                above = self.objective(self.forward, x, y, index, self.step, i)
            self.accumulator.backward(above)
        return loss.detach()

    def _look_at(self, losses: Tensor) -> None:
        self.interval.losses += losses.sum()
        if (losses.device.type == "cpu" or self.step % LOOK_EVERY == 0) and not self.group.total(
            bool(losses.isfinite().any())
        ):
            self.group.led(self._give_up)

    def _give_up(self) -> None:
        raise Diverged(
            f"step {self.step}: the loss must be a number; all {self.config.k} micro-batches gave NaN or infinity."
        )

    def evaluation(self) -> dict[str, Any]:
        """The line of records that closes an interval; moves a plateau schedule on."""
        started = time.perf_counter()
        measured = self._measured()
        loss = self.group.total(float(self.interval.losses))
        stats = self.accumulator.stats(self.config.b)
        number = self.problem.evaluation(self.step)
        if self.plateau is not None and number and number % self.config.plateau_every == 0:
            self.plateau.step(measured[f"{self.config.select_on}_loss"])
        self.seconds += self.interval.seconds + time.perf_counter() - started
        samples = self.step * self.config.k * self.config.b
        position = {
            "kind": "eval",
            "step": self.step,
            "steps_taken": stats["stepped"],
            "samples": samples,
        }
        progress = {
            "passes": samples / len(self.problem.train),
            "seconds": self.seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        noise = {key: stats[key] for key in ("noise_scale", "norm_dispersion")}
        line = position | progress | self.interval.line(self.config.b, loss) | noise | measured
        self.interval = self._new_interval()
        return line

    def _measured(self) -> dict[str, Any]:
        """What the model knows, or its average; with early stopping at the end, what it knew at its best."""
        model = self.model if self.average is None else self.average.module
        measured = self.group.led(partial(evaluate, model, self.problem))
        ended = self.step == self.problem.steps
        if self.stopping is None or not (ended or self.problem.evaluation(self.step)):
            return measured
        self.stopping.look(float(measured["heldout_accuracy"] or 0), model)
        if not (ended or self.over):
            return measured
        self.stopping.put_back(model)
        return self.group.led(partial(evaluate, model, self.problem))

    def _new_interval(self) -> Interval:
        return Interval(losses=torch.zeros((), device=self.device), rows=[])

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Everything that the rest of the run depends on, at the end of an interval, and how far the records go."""
        return {
            "config_hash": self.config.hash,
            "step": self.step,
            "seconds": self.seconds,
            "records_size": (folder / records.FILE).stat().st_size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "accumulator": self.accumulator.state_dict(),
            "objective": self.objective.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "stopping": None if self.stopping is None else self.stopping.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to that point. The state is that of one process or of k ranks, whichever this is."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.accumulator.load_state_dict(state["accumulator"])
        if isinstance(self.accumulator, OnDevice):
            self.accumulator.restored()
        self.objective.load_state_dict(state.get("objective", {}))  # older checkpoints have none
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.stopping is not None:
            self.stopping.load_state_dict(state["stopping"])
        torch.set_rng_state(state["random"])


def train(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    *,
    data_folder: Path | None = None,
    steps: int | None = None,
    resume: bool = False,
    keep_checkpoints: bool = True,
    command: str | None = None,
    group: Group = ALONE,
) -> records.Run:
    """Runs a config in `folder`; see `gaf_lab.records.run` for what it leaves there.

    Args:
        config: what to run.
        folder: made where it is missing; must not hold another run unless `resume`.
        listener: is told of every step and evaluation.
        data_folder: where the data set's archive or files are; None downloads it.
        steps: ends the run early, at this step.
        resume: go on from the folder's checkpoint; a run that is finished stays as it is.
        keep_checkpoints: write one at each evaluation.
        command: recorded, so that a reader can run it again.
        group: the ranks that call this, all with the same arguments. Rank 0 alone looks into the folder and writes to it, and
            its listener alone is told of evaluations.

    Raises:
        ConfigError, CheckpointError, DataError, OSError: where something given cannot be used.
        Diverged: where the loss is no longer a number; the message names the last good checkpoint.
        Elsewhere: on the other ranks, where one raised one of these.
    """
    options: dict[str, Any] = {
        "data_folder": data_folder,
        "steps": steps,
        "resume": resume,
        "keep_checkpoints": keep_checkpoints,
    }
    with contextlib.ExitStack() as held:
        group.led(lambda: claim(config, folder, resume, command, group, held))
        return finished(
            train_in_turns(config, folder, listener, **options, command=command, group=group)
        )


def train_in_turns(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    *,
    data_folder: Path | None = None,
    steps: int | None = None,
    resume: bool = False,
    keep_checkpoints: bool = True,
    command: str | None = None,
    group: Group = ALONE,
) -> Turns[records.Run]:
    """`train`, giving way to other runs while the device is at work on steps that were launched; see `gaf_lab.training.together`.

    Whoever calls this keeps other runs out of the folder (`gaf_lab.records.locks.own_folder`).
    """
    state, done = group.led(lambda: before(config, folder, resume, group))
    if done is not None:
        return done
    training = Training(config, data_folder, group)
    if state is not None:
        training.load_state_dict(state)
    first = partial(training.state_dict, folder) if keep_checkpoints else None
    group.led(lambda: begin_records(config, folder, training.device, command, state, group, first))
    status = "interrupted"
    try:
        status = yield from training.run_in_turns(folder, listener, steps, keep_checkpoints)
    except Diverged as error:
        status = "diverged"
        kept = folder / checkpoint.FILE
        raise Diverged(
            f"{error} {last_good(kept)} A lower learning rate is the usual way out."
        ) from None
    except RuntimeError as error:
        raise worker_died(error) from None
    finally:
        if group.leads:
            with contextlib.suppress(OSError):  # a full disk: the error under way says more
                records.append(
                    folder,
                    {
                        "kind": "end",
                        "status": status,
                        "seconds": training.seconds + training.interval.seconds,
                    },
                )
    return group.led(lambda: records.read(folder))


def claim(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    command: str | None,
    group: Group,
    held: contextlib.ExitStack,
) -> None:
    """Keeps other runs out of the folder for as long as `held` is open; leaves none behind for what cannot run."""
    check_config(config, group)
    check_free(folder)
    prepare_folder(folder, resume)
    held.enter_context(own_folder(folder, command))


def check_config(config: TrainConfig, group: Group) -> None:
    parallel.check(config, group.world)
    engine.check(config, group.world)


def before(
    config: TrainConfig, folder: Path, resume: bool, group: Group
) -> tuple[dict[str, Any] | None, records.Run | None]:
    """Looks whether the config can run in the folder; gives the checkpoint to go on from, and the run, where it is finished."""
    check_config(config, group)
    done = look_into(config, folder, resume)
    if unbegun(folder):
        (folder / records.FILE).unlink()
        return None, None
    return (checkpoint.load(folder, config) if resume and done is None else None), done


def look_into(config: TrainConfig, folder: Path, resume: bool) -> records.Run | None:
    """Refuses a folder that the config cannot run in; gives the run in it, where that is finished: there is nothing to do."""
    prepare_folder(folder, resume)
    return completed(config, folder) if resume and not unbegun(folder) else None


def begin_records(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    command: str | None,
    state: dict[str, Any] | None,
    group: Group,
    first: Callable[[], dict[str, Any]] | None,
) -> None:
    """Writes the header and, where checkpoints are kept, the first one; or cuts off what was written after the checkpoint `state`,
    for it will be written again."""
    if state is not None:
        go_back(folder / records.FILE, state["records_size"])
        return
    records.append(folder, header(config, folder, device, command, group))
    if first is not None:
        checkpoint.save(folder, first())


def go_back(path: Path, size: int) -> None:
    """Cuts the records off where the checkpoint was written."""
    if path.stat().st_size < size:
        raise checkpoint.CheckpointError(
            f"{path}: must hold the {size:,} bytes that the checkpoint goes on from; it has {path.stat().st_size:,}. "
            "It was cut off or replaced: put it back, or start again in another folder."
        )
    os.truncate(path, size)


def last_good(path: Path) -> str:
    return (
        f"The last good checkpoint is {path}." if path.is_file() else "There was no checkpoint yet."
    )


def prepare_folder(folder: Path, resume: bool) -> None:
    if resume and not unbegun(folder):
        checkpoint.find_checkpoint(folder)
    records.make_folder(folder)
    if not resume and (folder / records.FILE).exists() and not unbegun(folder):
        raise ConfigError(
            f"output folder {folder}: must not hold a run yet; it does. Go on with --resume, or give another --out."
        )


def unbegun(folder: Path) -> bool:
    """Whether the run in `folder` was stopped before its first checkpoint and evaluation: it begins anew, and nothing is lost."""
    path = folder / records.FILE
    if not path.is_file() or (folder / checkpoint.FILE).is_file():
        return False
    text = path.read_text(errors="replace")
    return (not text or text.startswith('{"kind": "run"')) and '{"kind": "eval"' not in text


def restarted(folder: Path) -> bool:
    """Whether this is a run in `folder` that torchrun starts again, a worker having failed, and not the user.

    Where it had no checkpoint yet its records are removed, for it starts anew.
    """
    launch = parallel.launch()
    if (
        launch is None
        or not (folder / records.FILE).is_file()
        or records.read(folder).header.get("launch") != launch
    ):
        return False
    if (folder / checkpoint.FILE).is_file():
        return True
    (folder / records.FILE).unlink()
    return False


def completed(config: TrainConfig, folder: Path) -> records.Run | None:
    """The run in `folder`, where it is finished and of this config: there is nothing to resume."""
    run = records.read(folder)
    finished = run.end is not None and run.end["status"] == "finished"
    return run if finished and run.header.get("config_hash") == config.hash else None


def header(
    config: TrainConfig, folder: Path, device: torch.device, command: str | None, group: Group
) -> dict[str, Any]:
    what = {
        "kind": "run",
        "name": folder.name,
        "arm": config.arm,
        "config": config.plain(),
        "config_hash": config.hash,
        "command": command,
    }
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    where = {
        "versions": environment.versions(),
        "machine": environment.machine(device),
        "commit": environment.commit(),
        "started": started,
    }
    return what | where | {"ranks": group.world, "launch": parallel.launch()}


def pick_device(name: str, group: Group = ALONE) -> torch.device:
    """On several ranks each has a CUDA device of its own."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError(
            "device must be one that is there; got 'cuda', and torch sees no CUDA device. Use --device cpu."
        )
    if name == "cpu" or not cuda:
        return torch.device("cpu")
    if group.world == 1:
        return torch.device("cuda")
    if group.local >= torch.cuda.device_count():
        raise ConfigError(f"device must be one for each rank on a machine; rank {group.rank} is number {group.local} on its machine, where "
                          f"torch sees {torch.cuda.device_count()}. Start fewer ranks there, or use --device cpu.")  # fmt: skip
    torch.cuda.set_device(group.local)
    return torch.device("cuda", group.local)


def learning_rate(config: TrainConfig) -> float:
    """The config's; for the control "scaled-lr" times the share of micro-gradients that the recorded run accepted."""
    if config.policy != "scaled-lr":
        return config.lr
    share = sum(recorded_rows(config)) / (len(recorded_rows(config)) * config.k)
    if not share:
        raise ConfigError(f"replay: the recorded run must have accepted something to scale the learning rate by; {config.replay} did not. "
                          "Replay a run with a higher tau.")  # fmt: skip
    return config.lr * share


def make_optimizer(
    config: TrainConfig, rate: float, params: list[nn.Parameter], fused: bool | None = None
) -> Optimizer:
    shared: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    if config.optimizer != "rmsprop":
        shared["fused"] = fused
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=config.momentum, nesterov=config.nesterov, **shared)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(params, momentum=config.momentum, **shared)
    return (torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW)(params, **shared)


def make_scheduler(config: TrainConfig, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "multi-step":
        return MultiStepLR(
            optimizer, [round(m * steps) for m in config.milestones], gamma=config.gamma
        )
    if config.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=config.gamma, patience=config.patience)
    return None


def make_policy(config: TrainConfig) -> Any:
    if config.policy == "gaf":
        rule: dict[str, Any] = {
            "start": config.start,
            "average": config.average,
            "min_accepted": config.min_accepted,
        }
        return gaf.GAF(make_tau(config), scope=config.scope, **rule)
    if config.policy == "random-skip":
        return gaf.RandomSkip(step_probability(config), config.seed)
    if config.policy == "replay-skip":
        return ReplaySkip(recorded_rows(config))
    if config.policy == "random-subset":
        return RandomSubset(recorded_rows(config), config.seed)
    return gaf.Mean()


def check_rows(config: TrainConfig, policy: Any, model: nn.Module, device: torch.device) -> None:
    """ConfigError where the k micro-gradients, which all but a streaming policy holds side by side, do not fit into memory."""
    if device.type == "cpu" and not streams(policy):
        n = sum(p.numel() for p in model.parameters())
        what = f"k = {config.k:,} micro-gradients of {n:,} numbers, held side by side"
        environment.check_memory(what, config.k * n * 4, "Lower k, or leave start at 'first'.")


def make_tau(config: TrainConfig) -> Any:
    """The config's tau, or the object that sets it, which starts from there."""
    if config.threshold in ("fixed", "auto"):
        return config.tau if config.threshold == "fixed" else "auto"
    kind, name = THRESHOLDS[config.threshold]
    given = {name: config.threshold_by, "half_life": config.half_life or None}
    try:
        return kind(
            initial=config.tau, **{key: value for key, value in given.items() if value is not None}
        )
    except ValueError as error:
        raise ConfigError(f"threshold_by: {error}") from None


def step_probability(config: TrainConfig) -> float:
    """The config's; with a recorded run the share of its steps that it took."""
    if config.replay is None:
        return config.step_probability
    rows = recorded_rows(config)
    return sum(n > 0 for n in rows) / len(rows)


def recorded_rows(config: TrainConfig) -> list[int]:
    assert config.replay is not None
    run = records.read(config.replay)
    recorded = run.header["config"]
    for name in ("k", "b"):
        if recorded.get(name) != getattr(config, name):
            raise ConfigError(f"replay: the recorded run must have the same {name}; it has {recorded.get(name)}, this one "
                              f"{getattr(config, name)}. Set --{name} to match.")  # fmt: skip
    return run.rows
