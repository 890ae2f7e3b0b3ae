"""The parts of a run, made from its config: device, optimizer, schedule, policy, steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

import gaf
from gaf.rules.judging import streams
from gaf_lab.data.run_data import RunData
from gaf_lab.records import environment
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.rules import GROWING
from gaf_lab.training.buckets import PerBucket
from gaf_lab.training.clipping import Clipped
from gaf_lab.training.controls import RandomSubset, ReplaySkip, Sizes, even_sizes
from gaf_lab.training.device_engine import OnDevice
from gaf_lab.training.engines import runs_on_device
from gaf_lab.training.objective import Forward, Objective
from gaf_lab.training.over_ranks import OverRanks, data_parallel
from gaf_lab.training.plain_engine import GradientSource, OneByOne, UntilEnough
from gaf_lab.training.ranks import ALONE, Group

THRESHOLDS: dict[str, tuple[Any, str]] = {  # by name, with the argument that `threshold_by` sets
    "signal": (gaf.SignalTau, "kappa"),
    "noise-floor": (gaf.NoiseFloorTau, "z"),
    "quantile": (gaf.QuantileTau, "p"),
    "moving-average": (gaf.MovingAverageTau, "margin"),
}
MakeOptimizer = Callable[..., Optimizer]  # (parameters, fused=None)
AnyAccumulator = gaf.Accumulator | OverRanks | OnDevice


def pick_device(name: str, group: Group = ALONE) -> torch.device:
    """The device of this rank. On several ranks, each has its own CUDA device."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError(
            "device must be one that is there; got 'cuda', and torch sees no CUDA device. "
            "Use --device cpu."
        )
    if name == "cpu" or not cuda:
        return torch.device("cpu")
    if group.world == 1:
        return torch.device("cuda")
    if group.local >= torch.cuda.device_count():
        raise ConfigError(
            "device must be one for each rank on a machine; "
            f"rank {group.rank} is number {group.local} on its machine, "
            f"where torch sees {torch.cuda.device_count()}. "
            "Start fewer ranks there, or use --device cpu."
        )
    torch.cuda.set_device(group.local)
    return torch.device("cuda", group.local)


def learning_rate(config: TrainConfig) -> float:
    """The config's learning rate.

    The control "scaled-lr" multiplies it by the share of micro-gradients that the recorded run
    accepted.
    """
    if config.policy != "scaled-lr":
        return config.lr
    rows = recorded_rows(config)
    share = sum(rows) / (len(rows) * config.k)
    if not share:
        raise ConfigError(
            "replay: the recorded run must have accepted something to scale the learning rate by; "
            f"{config.replay} did not. Replay a run with a higher tau."
        )
    return config.lr * share


def make_policy(config: TrainConfig) -> Any:
    if config.policy == "gaf":
        rule: dict[str, Any] = {
            "start": config.start,
            "average": config.average,
            "min_accepted": config.min_accepted,
            "metric": config.metric,
        }
        return gaf.GAF(make_tau(config), scope=config.scope, **rule)
    if config.policy == "random-skip":
        return gaf.RandomSkip(step_probability(config), config.seed)
    if config.policy == "replay-skip":
        return ReplaySkip(recorded_rows(config))
    if config.policy == "random-subset":
        return RandomSubset(recorded_rows(config), config.seed)
    if config.policy == "guard":
        return gaf.Guard()
    if config.policy == "median":
        return gaf.Median()
    return gaf.Mean()


def check_rows(config: TrainConfig, policy: Any, model: nn.Module, device: torch.device) -> None:
    """ConfigError if the k micro-gradients do not fit into memory.

    All policies but a streaming one hold them side by side.
    """
    if device.type == "cpu" and not streams(policy):
        n = sum(p.numel() for p in model.parameters())
        what = f"k = {config.k:,} micro-gradients of {n:,} numbers, held side by side"
        environment.check_memory(what, config.k * n * 4, "Lower k, or leave start at 'first'.")


def make_tau(config: TrainConfig) -> Any:
    """The config's tau, or the object that adapts it, which starts from the config's."""
    if config.threshold in ("fixed", "auto"):
        return config.tau if config.threshold == "fixed" else "auto"
    kind, name = THRESHOLDS[config.threshold]
    given: dict[str, Any] = {"initial": config.tau}
    if config.threshold_by is not None:
        given[name] = config.threshold_by
    if config.half_life:
        given["half_life"] = config.half_life
    try:
        return kind(**given)
    except ValueError as error:
        raise ConfigError(f"threshold_by: {error}") from None


def step_probability(config: TrainConfig) -> float:
    """The config's step probability; with a recorded run, the share of steps that it took."""
    if config.replay is None:
        return config.step_probability
    rows = recorded_rows(config)
    return sum(n > 0 for n in rows) / len(rows)


def recorded_rows(config: TrainConfig) -> list[int]:
    """The accepted micro-gradients at each step of the recorded run."""
    assert config.replay is not None
    run = records.read(config.replay)
    recorded = run.header["config"]
    for name in ("k", "b"):
        if recorded.get(name) != getattr(config, name):
            raise ConfigError(
                f"replay: the recorded run must have the same {name}; it has "
                f"{recorded.get(name)}, this one {getattr(config, name)}. Set --{name} to match."
            )
    return run.rows


def make_training_engine(
    problem: RunData,
    model: nn.Module,
    objective: Objective,
    policy: Any,
    optimizer: Optimizer,
    make: MakeOptimizer,
    group: Group,
    average: AveragedModel | None = None,
) -> tuple[AnyAccumulator, GradientSource]:
    """The accumulator of a run, which decides, and the source of its micro-gradients.

    make: makes an optimizer like `optimizer`. average: of the model's weights.
    """
    config = problem.config
    if runs_on_device(problem, group.world):
        fused = partial(make, fused=True)
        engine = OnDevice(problem, model, objective, policy, optimizer, fused, average)
        return engine, engine
    forward: Forward = torch.compile(model) if config.compile else model
    accumulator: gaf.Accumulator | OverRanks
    if group.world > 1:
        forward = parallel = data_parallel(model, group, problem, objective)
        accumulator = OverRanks(parallel, optimizer, policy)
    else:
        accumulator = make_accumulator(config, model, policy, optimizer)
    source = UntilEnough if config.policy in GROWING else OneByOne
    run = problem, model, objective, forward, accumulator, group.micro_batches(config.k)
    return accumulator, source(*run)


def make_accumulator(
    config: TrainConfig, model: nn.Module, policy: Any, optimizer: Optimizer
) -> gaf.Accumulator:
    if config.policy == "gaf" and config.scope == "group":
        return PerBucket(optimizer, policy, model)
    until = make_until(config) if config.policy in GROWING else None
    options: dict[str, Any] = {"model": model, "bn": config.bn, "until": until}
    if config.clip:
        return Clipped(optimizer, policy, config.clip, **options)
    return gaf.Accumulator(optimizer, policy, **options)


def make_until(config: TrainConfig) -> gaf.Agreement:
    """What ends the macro-batches of a growing policy."""
    if config.policy == "until-agreement":
        return gaf.Agreement(config.rho, config.at_most, rate=config.rate_by)
    sizes = recorded_rows(config)
    return Sizes(sizes if config.policy == "replay-sizes" else even_sizes(sizes), config.rate_by)
