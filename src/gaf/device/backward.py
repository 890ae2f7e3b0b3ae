"""One backward pass: from a loss and its parameters to one micro-gradient."""

from typing import NoReturn

import torch
from torch import Tensor

from gaf.device.buffers import Buffers
from gaf.device.checks import Names
from gaf.device.graph import goes_through, reaches
from gaf.device.parameters import Parameters


class BackwardPass:
    """Runs backward passes and checks that each of them reaches the parameters.

    Attributes:
        missing: trainable parameters without a gradient at the last graph check; a change
            triggers a new check.
        spare: rows of the last macro-batch. Each pass frees one, and its gradients take the memory.
    """

    def __init__(self) -> None:
        self.missing: list[bool] | None = None
        self.spare: list[Buffers] = []

    def run(self, loss: Tensor, parameters: Parameters, retain_graph: bool) -> Buffers:
        """Runs the backward pass and takes the gradients out of the parameters."""
        trained = [p for p in parameters.current if p.requires_grad]
        if not trained:
            raise ValueError(
                "Accumulator: the optimizer must hold at least one parameter that requires a "
                "gradient; all are frozen. Set requires_grad on some of them."
            )
        del self.spare[:1]
        torch.autograd.backward(loss, inputs=trained, retain_graph=retain_graph)
        row = parameters.take_gradients()
        check_row(loss, row, parameters)
        missing = [
            g is None and p.requires_grad for g, p in zip(row, parameters.current, strict=True)
        ]
        self._check_missing(loss, missing)
        return row

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


def check_row(loss: Tensor, row: Buffers, parameters: Parameters) -> None:
    """Refuses a row without gradients, sparse ones, and those that a hook has taken."""
    if all(grad is None for grad in row):
        check_reentrant(loss)
        raise_untouched(parameters.names)
    for j, (p, grad) in enumerate(zip(parameters.current, row, strict=True)):
        if grad is None and p._post_accumulate_grad_hooks and reaches(loss, p):
            raise RuntimeError(
                "Accumulator: a backward pass must leave each gradient in p.grad; that of "
                f"{parameters.name(j)!r} was taken by a hook, such as one that steps an optimizer "
                "during the backward pass. Leave the hook out."
            )
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"Accumulator: gradients must be dense; that of {parameters.name(j)!r} is "
                f"{grad.layout}. Use nn.Embedding(..., sparse=False)."
            )


def raise_untouched(names: Names) -> NoReturn:
    some = next(iter(names.values()))
    raise RuntimeError(
        "Accumulator: the loss must depend on the optimizer's parameters; none of the "
        f"{len(names)}, such as {some!r}, got a gradient. Make the optimizer from the parameters "
        "of the model that is trained, after it was moved, copied or wrapped, and leave out "
        "losses that depend on none of them."
    )
