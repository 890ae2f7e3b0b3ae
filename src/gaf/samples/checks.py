"""What `gaf.ghost_gram` refuses; each message names a way that works."""

from collections.abc import Collection
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf.samples.layers import Call

IN_ORDER: WeakSet[nn.Module] = WeakSet()  # layers whose first dimension was seen to be the samples
WAY = "with gaf.recording(model): losses = ..."


def check_losses(losses: Any, subject: str) -> None:
    """TypeError, ValueError or RuntimeError where these are no losses of single samples."""
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"{subject}: losses must be a tensor (n,), one loss for each sample; "
            f"got {type(losses).__name__}. Use reduction='none'."
        )
    if losses.ndim != 1 or not len(losses) or not losses.is_floating_point():
        raise ValueError(
            f"{subject}: losses must be n real numbers, one for each sample; got shape "
            f"{tuple(losses.shape)} of {losses.dtype}. Use reduction='none', and the mean or sum "
            "over all other dimensions."
        )
    if losses.grad_fn is None:
        raise RuntimeError(
            f"{subject}: losses must depend on parameters by operations that autograd has seen; "
            "they do not require grad. Compute them outside of torch.no_grad()."
        )


def check_model(model: Any, subject: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{subject}: model must be a torch.nn.Module; got {type(model).__name__}. "
            "Pass the model that made the losses."
        )


def check_whole(model: nn.Module, subject: str) -> None:
    """TypeError for a model whose parameters are sharded: others stand in for them in the graph."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FSDPModule | FullyShardedDataParallel):
            raise TypeError(
                f"{subject}: the model's parameters must be whole on each rank; it is, or holds, a "
                f"{type(module).__name__} whose parameters are sharded. Use "
                "DistributedDataParallel, or gaf.SampleAgreement with a score that needs the head "
                "alone."
            )


def choose_layers(
    model: nn.Module, layers: Collection[str] | None, subject: str
) -> dict[str, nn.Module]:
    """The modules by name that `layers` names, with all that is in them; None for all."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if layers is None:
        return modules
    if isinstance(layers, str) or not layers:
        raise ValueError(
            f"{subject}: layers must be names of modules; got {layers!r}. Give such as ['fc']."
        )
    for name in layers:
        if name not in modules:
            raise ValueError(
                f"{subject}: layers must be names of the model's modules; {name!r} is none. "
                f"There are: {', '.join(filter(None, modules))}."
            )
    inside = tuple(f"{name}." for name in layers)
    return {
        name: module
        for name, module in modules.items()
        if name in layers or "" in layers or name.startswith(inside)
    }


def check_uses(name: str, module: nn.Module, uses: int, noted: int, subject: str) -> None:
    """RuntimeError where a parameter is used by something whose inputs are not known.

    Args:
        name: of the parameter.
        module: that holds it.
        uses: how many operations in the losses' graph have it as an operand.
        noted: how many of them are noted calls of layers.
        subject: what was called, for the message.
    """
    if uses == noted:
        return
    raise RuntimeError(
        f"{subject}: each use of a trainable parameter must be a call of a layer that is known "
        "(Linear, Conv1d to 3d, Embedding, LayerNorm, GroupNorm, RMSNorm, BatchNorm) and recorded; "
        f"{name!r} of a {type(module).__name__} is used {uses} times by the losses, of which "
        f"{noted} were recorded. Run the forward pass inside the recording ({WAY}) and of the "
        "model before torch.compile. If the module is of another kind, leave it out "
        "(layers=[...], the names of those to take), or freeze it."
    )


def check_any_use(uses: Collection[Tensor], layers: Collection[str] | None, subject: str) -> None:
    """RuntimeError where K would be zero because nothing that counts acts on the losses."""
    if uses:
        return
    which = "the model" if layers is None else f"the layers {sorted(layers)}"
    raise RuntimeError(
        f"{subject}: the losses must depend on trainable parameters of {which}; they depend on "
        "none. Pass the model that made them, and layers that are trained."
    )


def check_call(name: str, call: Call, delta: Tensor, n: int, subject: str) -> None:
    """Refuses a call of which it is not clear what belongs to which sample."""
    module: Any = call.module
    if not call.is_intact:
        raise RuntimeError(
            f"{subject}: what a layer was given must still be there; the input or a running "
            f"statistic of {name!r} was written over after its forward pass. Use operations that "
            "are not in place, and call this right after the forward pass."
        )
    kernel = getattr(module, "kernel_size", None)
    least = 1 if isinstance(module, nn.Embedding) else 2 + len(kernel or ())
    if call.input.ndim < least:
        raise ValueError(
            f"{subject}: the layers must be called on batches; {name!r} was given shape "
            f"{tuple(call.input.shape)}. Add the dimension of the samples in front."
        )
    if not (len(call.input) == len(delta) == n):
        raise ValueError(
            f"{subject}: the first dimension of every layer's input must be the {n} samples; that "
            f"of {name!r} is {len(call.input)}. Give each sample its own entry (such as "
            "positions.expand(n, -1) for an embedding of positions, or (n, T, features) in place "
            "of (n * T, features)), or leave the layer out (layers=[...])."
        )
    if getattr(module, "scale_grad_by_freq", False):
        raise ValueError(
            f"{subject}: an Embedding's gradients must not be scaled by frequencies in the batch, "
            f"which belong to no sample; {name!r} has scale_grad_by_freq=True. Turn it off."
        )


def is_ambiguous(call: Call, n: int) -> bool:
    """Whether the input's shape fits as well if its first dimension is not that of the samples.

    So it is for positions (T,) and for inputs (T, n, features), where T = n.
    """
    module, shape = call.module, call.input.shape
    if n == 1 or module in IN_ORDER or not shape or shape[0] != n:
        return False
    if isinstance(module, nn.Embedding):
        return len(shape) == 1 or shape[1] == n
    by_position = isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm)
    return by_position and len(shape) > 2 and shape[1] == n


def check_order(name: str, call: Call, delta: Tensor | None, i: int, subject: str) -> None:
    """ValueError where losses[i] depends on other entries of a layer's output than entry i.

    delta: the gradient of losses[i] by the output.
    """
    if delta is not None and len(delta) == len(call.input):
        others = delta.flatten(1)
        if bool(((others != 0) & others.isfinite()).any(1).sum() > torch.any(others[i] != 0)):
            raise ValueError(
                f"{subject}: entry i of every layer's input must belong to sample i alone; "
                f"losses[{i}] depends on other entries of {name!r}, which was given shape "
                f"{tuple(call.input.shape)}. Put the samples first (batch_first), give each its "
                "own entry (positions.expand(n, -1)), or leave the layer out (layers=[...])."
            )
    IN_ORDER.add(call.module)


def check_sample_policy(policy: Any, scope: str, merges: bool) -> None:
    """ValueError for a policy that needs more of single samples than their K."""
    if scope != "all" or merges:
        what = f"scope {scope!r}" if scope != "all" else "a rule for each coordinate"
        raise ValueError(
            "Samples: the policy must decide about whole gradients from K, because single samples' "
            f"gradients are never there; {policy!r} has {what}. Use one such as gaf.GAF(tau=0.97)."
        )
