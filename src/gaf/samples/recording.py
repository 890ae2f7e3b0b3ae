"""Notes in the losses' graph what each layer was given, for `gaf.ghost_gram`.

The notes lie on the nodes of the graph itself, and so last as long as it does. A note keeps a
layer's input, which autograd keeps anyway for all layers but a frozen one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gaf.samples.layers import Call, can_handle

NOTE = "gaf.samples"  # key of a node's metadata


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Context in which the model's forward passes are prepared for `gaf.ghost_gram`.

        with gaf.recording(model):
            losses = cross_entropy(model(x), y, reduction="none")
        K = gaf.ghost_gram(model, losses)

    Only the forward pass has to be inside. It holds the inputs of the layers for as long as the
    losses' graph exists, most of which autograd holds anyway.

    Args:
        model: called eagerly: a model that torch.compile has made calls no hooks of its layers.
    """
    hooks = record_calls(model)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record_calls(model: nn.Module) -> list[RemovableHandle]:
    """Hooks that note the calls of all layers that can be handled."""
    return [
        module.register_forward_hook(note_call, prepend=True, with_kwargs=True)
        for module in model.modules()
        if can_handle(module)
    ]


def note_call(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    """Leaves a note on the node that made the output, unless there is one already."""
    node = output.grad_fn
    trained = any(p.requires_grad for p in module.parameters(recurse=False))
    if node is None or not trained or torch.compiler.is_compiling():
        return
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    metadata: Any = node.metadata
    metadata.setdefault(NOTE, Call(module, given, output.output_nr))


def uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, to be called eagerly inside a compiled one.

    A decorator would import the compiler with gaf.
    """
    if torch.compiler.is_compiling():
        eager: Callable[..., Tensor] = torch.compiler.disable(function)
        return eager
    return function
