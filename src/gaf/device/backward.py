"""One backward pass: from a loss and its parameters to one micro-gradient."""

from collections.abc import Callable
from functools import partial
from sys import getrefcount
from typing import NoReturn

import torch
from torch import Tensor

from gaf.device.checks import Names
from gaf.device.graph import goes_through
from gaf.device.parameters import Parameters

Take = Callable[[int, Tensor], None]  # is given a parameter's index and its gradient


class BackwardPass:
    """Runs backward passes and checks that each of them reaches the parameters.

    Attributes:
        missing: trainable parameters without a gradient at the last graph check; a change
            triggers a new check.
    """

    def __init__(self) -> None:
        self.missing: list[bool] | None = None

    def run(self, loss: Tensor, parameters: Parameters, take: Take, retain_graph: bool) -> None:
        """Runs the backward pass. Each gradient goes to `take` as soon as autograd delivers it."""
        trained = [(j, p) for j, p in enumerate(parameters.current) if p.requires_grad]
        if not trained:
            raise ValueError(
                "Accumulator: the optimizer must hold at least one parameter that requires a "
                "gradient; all are frozen. Set requires_grad on some of them."
            )
        taken: set[int] = set()

        def receive(j: int, p: Tensor) -> None:  # autograd runs hooks without recording
            grad, p.grad = p.grad, None
            if grad is None or j in taken or grad.layout != torch.strided:
                raise_unusable(parameters.name(j), grad)
            taken.add(j)
            take(j, unshare(grad))

        hooks = [p.register_post_accumulate_grad_hook(partial(receive, j)) for j, p in trained]
        try:
            torch.autograd.backward(loss, inputs=[p for _, p in trained], retain_graph=retain_graph)
        finally:
            for hook in hooks:
                hook.remove()
        if not taken:
            check_reentrant(loss)
            raise_untouched(parameters.names)
        missing = [p.requires_grad and j not in taken for j, p in enumerate(parameters.current)]
        self._check_missing(loss, missing)

    def _check_missing(self, loss: Tensor, missing: list[bool]) -> None:
        """Checks the loss's graph at the first pass, and where other gradients are missing."""
        if self.missing is None or (any(missing) and missing != self.missing):
            check_reentrant(loss)
            self.missing = missing


def check_reentrant(loss: Tensor) -> None:
    """Refuses reentrant checkpoints: a backward pass that names its inputs skips them silently."""
    if goes_through(loss, "CheckpointFunctionBackward"):
        raise RuntimeError(
            "Accumulator: activation checkpoints must not be reentrant; the loss went through one "
            "that is. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def raise_unusable(name: str, grad: Tensor | None) -> NoReturn:
    if grad is None:
        raise RuntimeError(
            "Accumulator: a backward pass must leave each gradient in p.grad; that of "
            f"{name!r} was taken by a hook, such as one that steps an optimizer during the "
            "backward pass. Leave the hook out."
        )
    if grad.layout != torch.strided:
        raise TypeError(
            f"Accumulator: gradients must be dense; that of {name!r} is {grad.layout}. "
            "Use nn.Embedding(..., sparse=False)."
        )
    raise RuntimeError(
        f"Accumulator: a backward pass must bring each parameter one gradient; {name!r} got two, "
        "from a backward pass within the backward pass (a reentrant checkpoint or the like). "
        "Use one that is not reentrant."
    )


def raise_untouched(names: Names) -> NoReturn:
    some = next(iter(names.values()))
    raise RuntimeError(
        "Accumulator: the loss must depend on the optimizer's parameters; none of the "
        f"{len(names)}, such as {some!r}, got a gradient. Make the optimizer from the parameters "
        "of the model that is trained, after it was moved, copied or wrapped, and leave out "
        "losses that depend on none of them."
    )


def unshare(grad: Tensor) -> Tensor:
    """The gradient, or a copy where its memory is shared: the result may be written over.

    Autograd can hand out a gradient whose memory another tensor uses too, and a hook can keep it.
    """
    kept = getrefcount(grad) > ALONE
    shared = torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > 2
    return grad.clone() if kept or shared else grad


def references(grad: Tensor) -> int:
    return getrefcount(grad)


def references_to_one_alone() -> int:
    """What `unshare` counts for a tensor that only its caller holds.

    The number depends on the version of Python.
    """
    grad = torch.empty(0, device="cpu")
    return references(grad)


ALONE = references_to_one_alone()
