"""Many small runs at once: copies of a network whose micro-gradients are computed in one go."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from gaf_lab.bench.guard_tasks import mean_loss

MOMENTUM = 0.9


class Fleet:
    """Copies of a network, each with its own weights, under SGD with momentum.

    Args:
        networks: r of them, alike.
        rate: learning rate.
    """

    def __init__(self, networks: Sequence[nn.Module], rate: float) -> None:
        self.network, self.rate = networks[0], rate
        parameters = stack_module_state(list(networks))[0]
        self.shapes = {name: p.shape[1:] for name, p in parameters.items()}
        self.weights = torch.cat([p.detach().flatten(1) for p in parameters.values()], 1)  # (r, n)
        self.velocity = torch.zeros_like(self.weights)

    def parts_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters from vectors (..., n)."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        shaped = zip(parts, self.shapes.items(), strict=True)
        return {name: part.unflatten(-1, shape) for part, (name, shape) in shaped}

    def rows(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Micro-gradients (r, k, n), each at its own weights (r, k, n), on x, y (r, k, b, ...)."""
        r, k, n = weights.shape

        def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return mean_loss(self._outputs(flat, x), y)

        each: Callable[..., Tensor] = vmap(grad(loss))
        found = each(weights.reshape(r * k, n), x.flatten(0, 1), y.flatten(0, 1))
        return found.reshape(r, k, n)

    def _outputs(self, flat: Tensor, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.network, self.parts_of(flat), (x,))
        return outputs

    def step(self, updates: Tensor, stepped: Tensor) -> None:
        """One step of those that step: updates (r, n), stepped (r,) bool."""
        moves = stepped[:, None]
        self.velocity = torch.where(moves, MOMENTUM * self.velocity + updates, self.velocity)
        self.weights = torch.where(moves, self.weights - self.rate * self.velocity, self.weights)

    def choose(self, which: Tensor) -> None:
        """Goes on with copies of these, (r,) their numbers."""
        self.weights, self.velocity = self.weights[which], self.velocity[which]

    def test(self, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
        """Loss and accuracy of each."""
        losses, shares = [], []
        with torch.no_grad():
            for flat in self.weights:
                outputs = self._outputs(flat, x)
                losses.append(mean_loss(outputs, y).item())
                shares.append((outputs.argmax(-1) == y).float().mean().item())
        return losses, shares
