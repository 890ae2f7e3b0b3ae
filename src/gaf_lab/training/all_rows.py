"""Optimizers whose second moments see every micro-gradient, also those that a policy rejects."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Any]


class OfAllRows(Optimizer):
    """Steps along the update, in the metric of the average of all micro-gradients.

    The second moment is that of the average of all micro-gradients since the step before, whatever
    was made of them; whatever else an optimizer keeps is of the update. So under averaging it is
    the optimizer that it is made of. A micro-gradient is what a backward pass leaves in p.grad.

    Args:
        params: of the model.
        given: what else the optimizer is given, by name.
        kept: the names of what it keeps of each parameter.
    """

    def __init__(self, params: list[nn.Parameter], given: State, kept: tuple[str, ...]) -> None:
        super().__init__(params, given)
        for group in self.param_groups:
            for p in group["params"]:
                zeros = {name: torch.zeros_like(p) for name in (*kept, "seen")}
                self.state[p] = {"step": 0, "rows": 0, **zeros}
                p.register_post_accumulate_grad_hook(self._see)

    @torch.no_grad()
    def _see(self, p: Tensor) -> None:
        """Adds a micro-gradient to those seen since the step before."""
        state = self.state[p]
        state["seen"] += p.grad
        state["rows"] += 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError(f"{type(self).__name__}: closure must be None; got one. Leave it out.")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, self.state[p], group)

    def _step(self, p: Tensor, update: Tensor, state: State, group: State) -> None:
        state["step"] += 1
        self.move(p, update, state["seen"] / max(state["rows"], 1), state, group)
        state["seen"].zero_()
        state["rows"] = 0

    @staticmethod
    @abstractmethod
    def move(p: Tensor, update: Tensor, mean: Tensor, state: State, group: State) -> None:
        """One parameter's step, with the mean of all micro-gradients since the step before."""


class AdamWOfAllRows(OfAllRows):
    """AdamW. lr, weight_decay, betas, eps: as for torch.optim.AdamW."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, given, ("exp_avg", "exp_avg_sq"))

    @staticmethod
    def move(p: Tensor, update: Tensor, mean: Tensor, state: State, group: State) -> None:
        """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["exp_avg"].lerp_(update, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1 ** state["step"]))


class RMSpropOfAllRows(OfAllRows):
    """RMSprop. lr, weight_decay, momentum, alpha, eps: as for torch.optim.RMSprop."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        alpha: float = 0.99,
        eps: float = 1e-8,
    ) -> None:
        moving = {"momentum": momentum, "alpha": alpha, "eps": eps}
        given = {"lr": lr, "weight_decay": weight_decay, **moving}
        super().__init__(params, given, ("square_avg", "momentum_buffer"))

    @staticmethod
    def move(p: Tensor, update: Tensor, mean: Tensor, state: State, group: State) -> None:
        """Tieleman and Hinton 2012, with momentum as in torch: of the divided updates."""
        decay = group["weight_decay"] * p
        mean, update, alpha = mean + decay, update + decay, group["alpha"]
        state["square_avg"].mul_(alpha).addcmul_(mean, mean, value=1 - alpha)
        root = state["square_avg"].sqrt().add_(group["eps"])
        state["momentum_buffer"].mul_(group["momentum"]).addcdiv_(update, root)
        p.sub_(state["momentum_buffer"], alpha=group["lr"])
