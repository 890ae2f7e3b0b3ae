"""The micro-gradients of a model that is not trained: K of each parameter, a slice of the coordinates at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gaf.gram import quick_gram
from gaf.shapes import Float64

Named = list[tuple[str, nn.Parameter]]
Losses = Sequence[Callable[[], Tensor]]  # each computes the loss of one micro-batch


def layer_grams(model: nn.Module, losses: Losses, slices: int) -> dict[str, Tensor]:
    """K (r, r) of each module's own parameters, by its name, with NaN for a row that is not finite. See `gaf.probe`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            "probe: the model must have parameters that require a gradient; it has none. Unfreeze what is to be trained."
        )
    layers: dict[str, Tensor] = {}
    for part in cut(named, slices):
        for (name, _), found in zip(part, grams(model, losses, part), strict=True):
            layer = name.rpartition(".")[0] or name
            layers[layer] = layers[layer] + found if layer in layers else found
    return layers


def grams(model: nn.Module, losses: Losses, part: Named) -> list[Float64[Tensor, "r r"]]:
    """K of each of these parameters; a row that is not finite has NaN in it."""
    params = [p for _, p in part]
    held = [torch.zeros(len(losses), p.numel(), dtype=p.dtype) for p in params]
    finite = torch.ones(len(losses), dtype=torch.bool)
    with untouched(model):
        for i, loss in enumerate(losses):
            for row, gradient in zip(
                held, torch.autograd.grad(loss(), params, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    row[i] = gradient.to_dense().reshape(-1)
                    finite[i] &= bool(row[i].isfinite().all())
    return [spread_out(quick_gram(row if finite.all() else row[finite]), finite) for row in held]


def spread_out(gram: Float64[Tensor, "f f"], finite: Tensor) -> Float64[Tensor, "r r"]:
    """The Gram matrix of the finite rows, with NaN where the others are."""
    whole = torch.full((len(finite), len(finite)), math.nan, dtype=torch.float64)
    whole[finite[:, None] & finite] = gram.flatten()
    return whole


def cut(named: Named, slices: int) -> list[Named]:
    """The parameters in order, in at most so many parts of about as many coordinates."""
    total, seen = sum(p.numel() for _, p in named), 0
    parts: list[Named] = [[] for _ in range(slices)]
    for name, p in named:
        parts[min(seen * slices // max(total, 1), slices - 1)].append((name, p))
        seen += p.numel()
    return [part for part in parts if part]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back, however it ends: buffers, modes, and torch's random state on the CPU and the model's devices."""
    modules = list(model.modules())
    buffers = [
        (m, name, t, t.detach().clone())
        for m in modules
        for name, t in m._buffers.items()
        if t is not None
    ]
    modes = [m.training for m in modules]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer


def loss_on(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], micro_batch: Any) -> Tensor:
    """The micro-batch's loss ()."""
    if isinstance(micro_batch, Mapping):
        loss = loss_fn(model(**micro_batch), micro_batch)
    else:
        x, y = micro_batch
        loss = loss_fn(model(x), y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"probe: loss_fn must return the mean loss of a micro-batch, a tensor of one number; got {seen}. Use reduction='mean'."
        )
    return loss


def same_size(micro_batches: Sequence[Any]) -> int:
    """Samples in each micro-batch."""
    sizes = [samples_in(one) for one in micro_batches]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(f"probe: micro_batches must all hold as many samples; number {i} holds {size}, the first {sizes[0]}. "
                             "Use drop_last=True in the DataLoader.")  # fmt: skip
    return sizes[0] if sizes else 0


def samples_in(micro_batch: Any) -> int:
    parts = (
        micro_batch.values()
        if isinstance(micro_batch, Mapping)
        else micro_batch
        if isinstance(micro_batch, list | tuple)
        else ()
    )
    first = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if first is None or (not isinstance(micro_batch, Mapping) and len(parts) != 2):
        raise TypeError("probe: a micro-batch must be a pair (x, y) or a mapping, with a tensor of b samples in it; got "
                        f"{type(micro_batch).__name__}. Where it holds no tensor, pass b=.")  # fmt: skip
    return len(first)


def check_model(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise TypeError("probe: model must be the module itself; got DistributedDataParallel, which averages gradients over ranks. "
                        "Give ddp.module, and micro-batches of one rank.")  # fmt: skip
    sharded = next(
        (name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None
    )
    if sharded is not None:
        raise TypeError(f"probe: parameters must be whole; {sharded!r} is a DTensor (FSDP2 or tensor parallel). "
                        "Probe the model before it is sharded, or its checkpoint on one device.")  # fmt: skip
