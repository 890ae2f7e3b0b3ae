"""Ways to K of single samples, each with its forward pass."""

import copy
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import gaf
from gaf.rules.blas import matrix_product

PLAIN_BACKWARD = "forward and backward"
GHOST = "gaf.ghost_gram"
PER_SAMPLE = "vmap(grad)"
TORCHJD = "TorchJD autogram"

Work = Callable[[nn.Module, Tensor, Tensor], object]


def ways_to_gram(model: nn.Module) -> dict[str, Work]:
    """The ways by name; TorchJD's only if it is installed."""
    ways: dict[str, Work] = {
        PLAIN_BACKWARD: backward_only,
        GHOST: ghost,
        PER_SAMPLE: per_sample_gradients,
    }
    if find_spec("torchjd") is not None:
        from torchjd.autogram import Engine

        own = copy.deepcopy(model)  # its hooks stay
        engine = Engine(own, batch_dim=0)
        ways[TORCHJD] = lambda _, x, y: engine.compute_gramian(losses_of(own, x, y))
    return ways


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y, reduction="none")


def backward_only(model: nn.Module, x: Tensor, y: Tensor) -> object:
    return torch.autograd.grad(losses_of(model, x, y).sum(), list(model.parameters()))


def ghost(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with gaf.recording(model):
        losses = losses_of(model, x, y)
    return gaf.ghost_gram(model, losses)


def per_sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Gram matrix of gradients that are all there at once."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, (x[None],)), y[None])

    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    flat = [g.flatten(1) for g in rows.values()]
    return torch.stack([matrix_product(part) for part in flat]).sum(0)
