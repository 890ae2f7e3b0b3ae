"""Which models and loss functions `gaf.probe` refuses."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

FSDP1 = "FullyShardedDataParallel"  # by name: importing it takes a second


def check_probed_model(model: nn.Module) -> None:
    """TypeError if the micro-gradients of this model cannot be measured."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"probe: model must be a torch.nn.Module; got {type(model).__name__}. "
            "Give the model that is trained: gaf.probe(model, loss_fn, micro_batches)."
        )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == FSDP1:
            raise TypeError(
                f"probe: model must be the module itself; got {type(module).__name__}, which "
                "averages gradients over ranks. Give ddp.module, or for FSDP the model before it "
                "is wrapped, and micro-batches of one rank."
            )
    for name, p in model.named_parameters():
        check_probed_parameter(name, p)


def check_probed_parameter(name: str, p: nn.Parameter) -> None:
    if hasattr(p, "device_mesh"):
        raise TypeError(
            f"probe: parameters must be whole; {name!r} is a DTensor (FSDP2 or tensor parallel). "
            "Probe the model before it is sharded, or its checkpoint on one device."
        )
    if is_lazy(p):
        raise TypeError(
            f"probe: parameters must have been made; {name!r} waits for the first forward pass. "
            "Run one on a micro-batch first."
        )
    if p.is_complex():
        raise TypeError(
            f"probe: parameters must be real; {name!r} is {p.dtype}. Use torch.view_as_real."
        )


def check_loss_fn(loss_fn: Any) -> None:
    """TypeError if it is no function; a class such as CrossEntropyLoss is none."""
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise TypeError(
            "probe: loss_fn must be a function of the model's output and y that returns the mean "
            f"loss; got {loss_fn!r}. "
            "Use torch.nn.functional.cross_entropy, or torch.nn.CrossEntropyLoss()."
        )
