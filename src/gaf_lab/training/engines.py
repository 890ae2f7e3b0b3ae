"""Which engine runs a config, and which configs the device engine or several ranks cannot run."""

import torch

from gaf_lab.data.items import Items
from gaf_lab.data.problem import Augmentation
from gaf_lab.data.run_data import RunData
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.rules import GROWING
from gaf_lab.training.optimizers import PACKAGED


def obstacle(config: TrainConfig, world: int = 1) -> str | None:
    """Why the device engine cannot run a config; None if it can.

    The message names the field, the requirement and the value.
    """
    needs = {
        "dataset": (config.dataset != "imagenet", "must fit into the device's memory"),
        "optimizer": (
            config.optimizer in ("sgd", "adam", "adamw"),
            "must have a fused form, which skips without the host",
        ),
        "policy": (
            config.policy not in ("guard", "median", *GROWING),
            "must need neither its own past nor all rows, and take k micro-batches per step",
        ),
        "clip": (not config.clip, "must be 0"),
        "mixup": (not config.mixup, "must be 0"),
        "sam": (not config.sam, "must be 0"),
        "shuffle_weights": (not config.shuffle_weights, "must be off"),
        "bn": (config.bn == "all", "must be 'all'"),
        "metric": (config.metric == "euclidean", "must be 'euclidean'"),
        "scope": (config.scope == "all" or config.policy != "gaf", "must be 'all'"),
        "compile": (not config.compile, "must be off"),
    }
    for name, (holds, requirement) in needs.items():
        if not holds:
            return f"{name} {requirement} for engine 'device'; got {getattr(config, name)!r}."
    if world > 1:
        return f"engine must not be 'device' on several ranks; got it on {world}."
    return None


def check_device_engine(config: TrainConfig, world: int) -> None:
    """ConfigError if the config names the device engine, and that engine cannot run it."""
    found = obstacle(config, world)
    if config.engine == "device" and found is not None:
        raise ConfigError(f"{found} Use --engine plain.")


def uses_device_engine(config: TrainConfig, device: torch.device, world: int) -> bool:
    """Whether the device engine runs the config: if named, and under "auto" on CUDA if it can."""
    possible = device.type == "cuda" and obstacle(config, world) is None
    return config.engine == "device" or (config.engine == "auto" and possible)


def data_obstacle(data: RunData) -> str | None:
    """Why the device engine cannot run a task; None if it can."""
    augment = data.problem.augment
    if isinstance(data.train.x, Items):
        return "train must be tensors for engine 'device'; the task has a Dataset."
    if augment is not None and not isinstance(augment, Augmentation):
        return "augment must be a gaf_lab.Augmentation for engine 'device'; it is a function."
    return None


def runs_on_device(data: RunData, world: int) -> bool:
    """Whether the device engine runs these data.

    Under "auto" it does if the task says that nothing in it waits for the device.

    Raises:
        ConfigError: if the config names that engine, and it cannot run the task.
    """
    if not uses_device_engine(data.config, data.device, world):
        return False
    found = data_obstacle(data)
    if data.config.engine == "auto":
        return found is None and data.problem.captures
    if found is not None:
        raise ConfigError(f"{found} Use --engine plain.")
    return True


def check_ranks(config: TrainConfig, world: int) -> None:
    """ConfigError if `world` ranks cannot run the config."""
    if world == 1:
        return
    if config.k != world:
        raise ConfigError(
            "k must be the number of ranks, because each computes one micro-batch; "
            f"got k = {config.k} on {world} ranks. "
            f"Start {config.k} of them (torchrun --nproc-per-node), or set --k {world}."
        )
    if config.bn == "accepted":
        raise ConfigError(
            "bn must be 'all' on several ranks, because DistributedDataParallel hands out "
            f"the statistics of rank 0, accepted or not; got 'accepted' on {world} ranks. "
            "Set --bn all, or run one process."
        )
    if config.compile:
        raise ConfigError(
            f"compile must be off on several ranks; got it on {world}. "
            "Set --no-compile, or run one process."
        )
    if config.clip:
        raise ConfigError(
            f"clip must be 0 on several ranks; got {config.clip:g} on {world}. "
            "Set it to 0, or run one process."
        )
    if config.optimizer in (*PACKAGED, "adamw-all", "rmsprop-all"):
        raise ConfigError(
            "optimizer must be one of torch's on several ranks, because the others count skipped "
            f"steps or see one rank's rows alone; got {config.optimizer!r} on {world} ranks. "
            "Run one process."
        )
    if config.loss == "elr":
        raise ConfigError(
            "loss must not be 'elr' on several ranks, because a sample's past predictions are "
            f"known only to the rank that drew it; got 'elr' on {world} ranks. Run one process."
        )
    if config.agreement != "none" or config.audit_passes:
        raise ConfigError(
            "agreement must be 'none' and audit_passes 0 on several ranks, because what was seen "
            f"of a sample is known only to the rank that drew it; got {config.agreement!r} and "
            f"{config.audit_passes:g} on {world} ranks. Run one process."
        )
    if config.policy == "gaf" and config.scope == "group":
        raise ConfigError(
            "scope must be 'all' on several ranks, because gaf.attach reports only the last "
            f"bucket's decision, and the records need all; got 'group' on {world} ranks. "
            "Run one process."
        )
