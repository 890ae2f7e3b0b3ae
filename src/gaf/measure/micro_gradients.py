"""The micro-gradients of a model that is not trained: K of each parameter, a slice of the coordinates at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gaf.measure.untouched import untouched
from gaf.rules.blas import gram_by_blas, no_autocast
from gaf.shapes import Float64

FSDP1 = "FullyShardedDataParallel"  # by name, for importing it takes a second
COMPILED = "_orig_mod."  # before the names in a compiled module

Named = list[tuple[str, nn.Parameter]]
Losses = Sequence[Callable[[], Tensor]]  # each computes the loss of one micro-batch


def layer_grams(
    model: nn.Module, losses: Losses, slices: int, others: Sequence[Any] = ()
) -> dict[str, Tensor]:
    """K (r, r) of each module's own parameters, by its name, with NaN for a row that is not finite. See `gaf.probe`."""
    named = [
        (name.replace(COMPILED, ""), p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if not named:
        raise ValueError(
            "probe: the model must have parameters that require a gradient; it has none. Unfreeze what is to be trained."
        )
    layers: dict[str, Tensor] = {}
    for part in cut(named, slices):
        with untouched(model, *others):
            found = grams(losses, part)
        for (name, _), K in zip(part, found, strict=True):
            layer = name.rpartition(".")[0] or name
            layers[layer] = layers[layer] + K if layer in layers else K
    return layers


def grams(losses: Losses, part: Named) -> list[Float64[Tensor, "r r"]]:
    """K of each of these parameters; a row that is not finite has NaN in it."""
    params = [p for _, p in part]
    held = [
        torch.zeros(len(losses), p.numel(), dtype=dtype_of_gradient(p), device="cpu")
        for p in params
    ]
    finite = torch.ones(len(losses), dtype=torch.bool, device="cpu")
    for i, loss in enumerate(losses):
        for row, gradient in zip(held, gradients(loss(), params), strict=True):
            if gradient is not None:
                row[i] = gradient.to_dense().reshape(-1)
                finite[i] &= bool(row[i].isfinite().all())
    return [spread_out(gram_by_blas(row if finite.all() else row[finite]), finite) for row in held]


def gradients(loss: Tensor, params: list[nn.Parameter]) -> Sequence[Tensor | None]:
    """As a training step has them, whose backward pass is outside of autocast."""
    if not loss.requires_grad:
        raise TypeError("probe: the loss must depend on parameters that require a gradient; it requires none. Leave out no_grad() and "
                        "detach() in the model and in loss_fn.")  # fmt: skip
    trained = [p for p in params if p.requires_grad]  # a forward pass may freeze some
    if not trained:
        return [None] * len(params)
    with no_autocast(loss.device.type, *(p.device.type for p in trained)):
        found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in params]


def dtype_of_gradient(p: nn.Parameter) -> torch.dtype:
    return getattr(p, "grad_dtype", None) or p.dtype


def spread_out(gram: Float64[Tensor, "f f"], finite: Tensor) -> Float64[Tensor, "r r"]:
    """The Gram matrix of the finite rows, with NaN where the others are."""
    whole = torch.full((len(finite), len(finite)), math.nan, dtype=torch.float64, device="cpu")
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


def loss_on(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], micro_batch: Any) -> Tensor:
    """The micro-batch's loss ()."""
    if isinstance(micro_batch, Mapping):
        loss = loss_fn(model(**micro_batch), micro_batch)
    else:
        x, y = pair_of(micro_batch)
        loss = loss_fn(model(x), y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"probe: loss_fn must return the mean loss of a micro-batch, a tensor of one number; got {seen}. Use reduction='mean'."
        )
    return loss


def pair_of(micro_batch: Any) -> tuple[Any, Any]:
    if isinstance(micro_batch, list | tuple) and len(micro_batch) == 2:
        return micro_batch[0], micro_batch[1]
    parts = f" of {len(micro_batch)}" if isinstance(micro_batch, list | tuple) else ""
    raise TypeError(f"probe: a micro-batch must be a pair (x, y) or a mapping; got {type(micro_batch).__name__}{parts}. "
                    "Have the loader give pairs, or dictionaries of what the model takes by name.")  # fmt: skip


def iterator_of(micro_batches: Any) -> Iterator[Any]:
    try:
        return iter(micro_batches)
    except TypeError as error:
        raise TypeError(f"probe: micro_batches must be an iterable of (x, y) pairs or mappings; got {type(micro_batches).__name__}. "
                        "Give a DataLoader or a list.") from error  # fmt: skip


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"probe: model must be a torch.nn.Module; got {type(model).__name__}. "
                        "Give the model that is trained: gaf.probe(model, loss_fn, micro_batches).")  # fmt: skip
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == FSDP1:
            raise TypeError(f"probe: model must be the module itself; got {type(module).__name__}, which averages gradients over ranks. "
                            "Give ddp.module, or for FSDP the model before it is wrapped, and micro-batches of one rank.")  # fmt: skip
    for name, p in model.named_parameters():
        if hasattr(p, "device_mesh"):
            raise TypeError(f"probe: parameters must be whole; {name!r} is a DTensor (FSDP2 or tensor parallel). "
                            "Probe the model before it is sharded, or its checkpoint on one device.")  # fmt: skip
        if is_lazy(p):
            raise TypeError(f"probe: parameters must have been made; {name!r} waits for the first forward pass. "
                            "Run one on a micro-batch first.")  # fmt: skip
        if p.is_complex():
            raise TypeError(
                f"probe: parameters must be real; {name!r} is {p.dtype}. Use torch.view_as_real."
            )


def check_callable(loss_fn: Any) -> None:
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise TypeError(f"probe: loss_fn must be a function of the model's output and y that returns the mean loss; got {loss_fn!r}. "
                        "Use torch.nn.functional.cross_entropy, or torch.nn.CrossEntropyLoss().")  # fmt: skip
