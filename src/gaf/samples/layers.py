"""From a layer's input and its output's gradient to the per-sample gradients of its parameters.

A layer counts as the class whose `forward` it has: a subclass with a forward of its own computes
something else.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gaf.rules.slices import half_to_float32
from gaf.samples.pieces import Dense, Outer, Piece, Tokens

Made = Iterator[tuple[Tensor | None, Callable[[], Piece]]]  # a parameter, and what makes its piece


class Call:
    """One call of a layer, with what its parameters' gradients are made of.

    Attributes:
        module: the layer.
        input: what it was given, outside of the graph.
        training: whether the layer was in training mode.
        place: which of its node's outputs is the layer's.
    """

    def __init__(self, module: nn.Module, given: Tensor, place: int) -> None:
        self.module, self.input, self.place = module, given.detach(), place
        self.training = module.training
        statistics = [] if module.training else [*module.buffers(recurse=False)]
        self._versions = [(t, t._version) for t in (self.input, *statistics)]

    @property
    def is_intact(self) -> bool:
        """Whether nothing that the layer used was written over since."""
        return all(t._version == version for t, version in self._versions)


def can_handle(module: nn.Module) -> bool:
    """Whether this is a layer with parameters whose per-sample gradients are known."""
    return type(module).forward in HANDLERS and any(True for _ in module.parameters(recurse=False))


def weight_and_bias(module: nn.Module) -> list[Tensor]:
    """The layer's own weight and bias, as far as there are any."""
    return [p for p in (module.weight, getattr(module, "bias", None)) if isinstance(p, Tensor)]


def pieces_of_call(call: Call, delta: Tensor) -> Made:
    """The layer's parameters, each with what makes its per-sample gradients.

    Args:
        call: of the layer.
        delta: the gradient of the call's output, in the output's shape.
    """
    handler = HANDLERS[type(call.module).forward]
    return handler(call, half_to_float32(call.input), half_to_float32(delta))


def linear(call: Call, x: Tensor, delta: Tensor) -> Made:
    module: Any = call.module
    left, right = by_position(delta)[:, None], by_position(x)[:, None]
    yield module.weight, partial(Outer, left, right)
    yield module.bias, lambda: Dense(left.sum((1, 2)))


def by_position(x: Tensor) -> Tensor:
    """(n, ..., features) -> (n, T, features)"""
    return x.reshape(len(x), -1, x.shape[-1])


def convolution(call: Call, x: Tensor, delta: Tensor) -> Made:
    module: Any = call.module
    left = delta.reshape(len(x), module.groups, delta.shape[1] // module.groups, -1)
    yield module.weight, lambda: Outer(left.mT, pad(module, x), partial(patches, module))
    yield module.bias, lambda: Dense(left.sum(3).flatten(1))


def pad(module: Any, x: Tensor) -> Tensor:
    """The picture with the convolution's padding around it."""
    sizes = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sizes, mode=mode) if any(sizes) else x


def patches(module: Any, x: Tensor) -> Tensor:
    """What each position of the output sees of padded pictures: (m, groups, T, channels x size)."""
    for i, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    d = len(module.kernel_size)
    x = x.unflatten(1, (module.groups, -1))  # (m, G, C / G, positions..., kernel...)
    order = [0, 1, 2, *range(3 + d, 3 + 2 * d), *range(3, 3 + d)]
    return x.permute(order).flatten(2 + d + 1).flatten(2, 2 + d).mT


def embedding(call: Call, x: Tensor, delta: Tensor) -> Made:
    module: Any = call.module
    ids, right = x.reshape(len(x), -1), by_position(delta)
    if module.padding_idx is not None:
        right = right.masked_fill((ids == module.padding_idx)[..., None], 0)
    yield module.weight, partial(Tokens, ids, right, module.num_embeddings)


def layer_norm(call: Call, x: Tensor, delta: Tensor) -> Made:
    module: Any = call.module
    normal = partial(F.layer_norm, x, module.normalized_shape, eps=module.eps)
    return trailing(module, normal, delta)


def rms_norm(call: Call, x: Tensor, delta: Tensor) -> Made:
    module: Any = call.module
    normal = partial(F.rms_norm, x, module.normalized_shape, eps=module.eps)
    return trailing(module, normal, delta)


def trailing(module: Any, normal: Callable[[], Tensor], delta: Tensor) -> Made:
    """Scale and shift of the last dimensions."""
    size = math.prod(module.normalized_shape)

    def total(x: Tensor) -> Dense:
        return Dense(x.reshape(len(x), -1, size).sum(1))

    yield module.weight, lambda: total(delta * normal())
    yield getattr(module, "bias", None), lambda: total(delta)


def group_norm(call: Call, x: Tensor, delta: Tensor) -> Made:
    module: Any = call.module
    return by_channel(module, partial(F.group_norm, x, module.num_groups, eps=module.eps), delta)


def batch_norm(call: Call, x: Tensor, delta: Tensor) -> Made:
    """Exact in evaluation mode; in training mode the batch's statistics are held constant."""
    module: Any = call.module
    running = module.running_mean, module.running_var
    by_batch = call.training or running[0] is None
    mean, var = (None, None) if by_batch else running
    normal = partial(F.batch_norm, x, mean, var, training=by_batch, eps=module.eps)
    return by_channel(module, normal, delta)


def by_channel(module: Any, normal: Callable[[], Tensor], delta: Tensor) -> Made:
    """Scale and shift of each channel."""

    def total(x: Tensor) -> Dense:
        return Dense(x.reshape(len(x), x.shape[1], -1).sum(2))

    yield module.weight, lambda: total(delta * normal())
    yield module.bias, lambda: total(delta)


HANDLERS: dict[Any, Callable[[Call, Tensor, Tensor], Made]] = {
    nn.Linear.forward: linear,
    nn.Conv1d.forward: convolution,
    nn.Conv2d.forward: convolution,
    nn.Conv3d.forward: convolution,
    nn.Embedding.forward: embedding,
    nn.LayerNorm.forward: layer_norm,
    nn.RMSNorm.forward: rms_norm,
    nn.GroupNorm.forward: group_norm,
    nn.BatchNorm1d.forward: batch_norm,
}
