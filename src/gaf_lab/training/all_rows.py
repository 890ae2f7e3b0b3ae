"""AdamW whose second moments see every micro-gradient, also those that a policy rejects."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamWOfAllRows(Optimizer):
    """AdamW that steps along the update, in the metric of the average of all micro-gradients.

    The first moment is that of the update. The second moment is that of the average of all
    micro-gradients since the step before, whatever was made of them. So under averaging it is
    AdamW. A micro-gradient is what a backward pass leaves in p.grad.

    Args:
        params: of the model.
        lr, weight_decay, betas, eps: as for torch.optim.AdamW.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, given)
        for group in self.param_groups:
            for p in group["params"]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "seen")}
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
            raise ValueError("AdamWOfAllRows: closure must be None; got one. Leave it out.")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    move(p, p.grad, self.state[p], group)


def move(p: Tensor, update: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One parameter's step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    state["step"] += 1
    mean = state["seen"] / max(state["rows"], 1)
    state["exp_avg"].lerp_(update, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
    root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
    p.mul_(1 - lr * group["weight_decay"])
    p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1 ** state["step"]))
    state["seen"].zero_()
    state["rows"] = 0
