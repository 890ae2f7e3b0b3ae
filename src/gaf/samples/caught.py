"""What the head was given for a batch, caught by a hook."""

from typing import Any

import torch
from torch import Tensor

from gaf.samples.agreement_checks import check_features
from gaf.shapes import Float

KEPT = 4  # calls of the head since the last loss


class Caught:
    """Hook that keeps the head's last inputs, and what it made of them.

    A model may run again between a batch and its loss: on unlabelled samples, or on others to
    watch. So of several calls the one counts whose outputs the loss is given.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        self.calls = [*self.calls[1 - KEPT :], (given.detach(), output.detach())]

    def take(self, outputs: Tensor) -> Float[Tensor, "n p"]:
        """The features of the batch with these outputs. Forgets all calls.

        Outputs after a cast, a softmax or another monotone function are known by their largest
        entries. If no call is nearer to the outputs than others, the last one counts.
        """
        calls, self.calls = self.calls, []
        fitting = [call for call in calls if call[0].ndim == 2 and len(call[0]) == len(outputs)]
        if len(fitting) > 1:
            fitting.sort(key=lambda call: likeness(call[1], outputs))  # equals keep their order
        chosen = fitting or calls
        return check_features(chosen[-1][0] if chosen else None, len(outputs))


def likeness(made: Tensor, outputs: Tensor) -> tuple[bool, float]:
    """Whether the head's outputs are those of the model, and the share of equal answers."""
    if made.shape != outputs.shape or made.ndim != 2:
        return False, 0.0
    equal = torch.equal(made.to(outputs.dtype), outputs)
    return equal, float((made.argmax(1) == outputs.argmax(1)).float().mean())
