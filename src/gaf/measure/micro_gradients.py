"""The micro-gradients of a model that is not trained: K of each parameter, slice by slice."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaf.measure.untouched import keep_untouched
from gaf.rules.blas import gram_by_blas, no_autocast
from gaf.shapes import Bool, Float64

COMPILED = "_orig_mod."  # before the names in a compiled module

Named = list[tuple[str, nn.Parameter]]
Losses = Sequence[Callable[[], Tensor]]  # each computes the loss of one micro-batch


def layer_grams(
    model: nn.Module, losses: Losses, slices: int, others: Sequence[Any] = ()
) -> dict[str, Tensor]:
    """K (r, r) of each module's own parameters, by its name; a row that is not finite has NaN.

    See `gaf.probe` for the arguments.
    """
    named = [
        (name.replace(COMPILED, ""), p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if not named:
        raise ValueError(
            "probe: the model must have parameters that require a gradient; it has none. "
            "Unfreeze what is to be trained."
        )
    layers: dict[str, Tensor] = {}
    for part in cut(named, slices):
        with keep_untouched(model, *others):
            found = parameter_grams(losses, part)
        for (name, _), K in zip(part, found, strict=True):
            layer = name.rpartition(".")[0] or name
            layers[layer] = layers[layer] + K if layer in layers else K
    return layers


def cut(named: Named, slices: int) -> list[Named]:
    """The parameters in order, in at most so many parts of about as many coordinates."""
    total, seen = sum(p.numel() for _, p in named), 0
    parts: list[Named] = [[] for _ in range(slices)]
    for name, p in named:
        parts[min(seen * slices // max(total, 1), slices - 1)].append((name, p))
        seen += p.numel()
    return [part for part in parts if part]


def parameter_grams(losses: Losses, part: Named) -> list[Float64[Tensor, "r r"]]:
    """K of each of these parameters; a row that is not finite has NaN in it."""
    params = [p for _, p in part]
    matrices = [empty_rows(p, len(losses)) for p in params]
    finite = torch.ones(len(losses), dtype=torch.bool, device="cpu")
    for i, loss in enumerate(losses):
        for rows, gradient in zip(matrices, gradients(loss(), params), strict=True):
            if gradient is not None:
                rows[i] = gradient.to_dense().reshape(-1)
                finite[i] &= bool(rows[i].isfinite().all())
    return [gram_with_nan(rows, finite) for rows in matrices]


def empty_rows(p: nn.Parameter, r: int) -> Tensor:
    """Room for r gradients of a parameter, (r, n), in main memory."""
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    return torch.zeros(r, p.numel(), dtype=dtype, device="cpu")


def gradients(loss: Tensor, params: list[nn.Parameter]) -> Sequence[Tensor | None]:
    """As a training step has them, whose backward pass is outside of autocast."""
    if not loss.requires_grad:
        raise TypeError(
            "probe: the loss must depend on parameters that require a gradient; it requires none. "
            "Leave out no_grad() and detach() in the model and in loss_fn."
        )
    trained = [p for p in params if p.requires_grad]  # a forward pass may freeze some
    if not trained:
        return [None] * len(params)
    with no_autocast(loss.device.type, *(p.device.type for p in trained)):
        found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in params]


def gram_with_nan(rows: Tensor, finite: Bool[Tensor, " r"]) -> Float64[Tensor, "r r"]:
    """The Gram matrix of the finite rows, with NaN for the others."""
    gram = gram_by_blas(rows if finite.all() else rows[finite])
    whole = torch.full((len(finite), len(finite)), math.nan, dtype=torch.float64, device="cpu")
    whole[finite[:, None] & finite] = gram.flatten()
    return whole
