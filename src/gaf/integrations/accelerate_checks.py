"""What `gaf.integrations.accelerate.attach` refuses."""

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gaf.integrations.accelerate_rows import SUBJECT, FilteredOptimizer


def check_kinds(accelerator: Any, model: Any, optimizer: Any) -> list[Any]:
    """The optimizers, as a list.

    Raises:
        TypeError: for arguments of another kind than `attach` takes.
    """
    call = "Call attach(accelerator, model, optimizer, policy)."
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"{SUBJECT}: the first argument must be accelerate's Accelerator; got "
            f"{type(accelerator).__name__}. {call}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{SUBJECT}: the model must be a module, as accelerator.prepare gave it; got "
            f"{type(model).__name__}. {call}"
        )
    if not isinstance(optimizer, Optimizer | list | tuple):
        raise TypeError(
            f"{SUBJECT}: the optimizer must be what accelerator.prepare gave, or a list of such; "
            f"got {type(optimizer).__name__}. {call}"
        )
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def check_setup(accelerator: Accelerator, model: nn.Module, optimizers: list[Any]) -> None:
    """Refuses setups in which gradients would bypass the filter."""
    for one in optimizers:
        check_prepared(one)
    if accelerator.distributed_type == DistributedType.NO:
        check_all_given(accelerator, optimizers)
    else:
        check_engine(accelerator, model)


def check_prepared(optimizer: Any) -> None:
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"{SUBJECT}: the optimizer must be what accelerator.prepare gave; got "
            f"{type(optimizer).__name__}. Attach after prepare."
        )
    if isinstance(optimizer, FilteredOptimizer):
        raise RuntimeError(
            f"{SUBJECT}: the optimizer must not be attached already; it is. "
            "Call detach() on what attach gave."
        )


def check_engine(accelerator: Accelerator, model: nn.Module) -> None:
    if not isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel):
        raise TypeError(
            f"{SUBJECT}: the model must be prepared, in one process or for "
            f"DistributedDataParallel; got {type(model).__name__} under "
            f"{accelerator.distributed_type}. DeepSpeed, FSDP, Megatron-LM and XLA reduce the "
            "gradients before anyone can look: choose plain data parallelism (for FSDP2, "
            "gaf.attach in a loop of your own)."
        )
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise ValueError(
            f"{SUBJECT}: in several processes sync_each_batch must be False; with True, a rank's "
            "gradients would mix with the update of the micro-batches before. Leave it out."
        )


def check_all_given(accelerator: Accelerator, optimizers: list[Any]) -> None:
    missing = [one for one in accelerator._optimizers if all(one is not o for o in optimizers)]
    if missing:
        names = ", ".join(type(one.optimizer).__name__ for one in missing)
        raise ValueError(
            f"{SUBJECT}: in one process every prepared optimizer must be given, because "
            f"accelerator.backward then serves those alone; missing: {names}. "
            "Give them all as a list."
        )
