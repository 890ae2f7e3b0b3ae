"""The optimizer's own metric, from its second moments: `GAF(metric="optimizer")`.

    <g, M g'>        M = 1 / (sqrt(v) + eps)        v: of the steps before

With these products rows agree if the optimizer's updates of them do, up to what v is about to take
in. M is the denominator of torch's own step, with eps of the parameter's group:

    Adam, AdamW      exp_avg_sq / (1 - beta2^t), with amsgrad max_exp_avg_sq: bias corrected
    RMSprop          square_avg, if centered less grad_avg^2: not corrected, as in torch
    Adagrad          sum: not corrected

Before the first step there is no v: the products are then plain, with M = 1. Once some parameters
of a decision have a v, one that no step has moved yet has no part in it. Where v is zero, M is
1 / eps: a coordinate that got no gradient so far weighs much when it gets one.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, Optimizer, RMSprop

from gaf.rules.contract import Policy, metric_of

Cut = Callable[[Tensor], Tensor]  # takes the coordinates that are wanted out of a parameter's state


class SecondMoments:
    """Square roots of M, by parameter and coordinates.

    Args:
        optimizers: Adam, AdamW, RMSprop or Adagrad.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.places: dict[Tensor, tuple[Optimizer, dict[str, Any]]] = {
            p: (optimizer, group)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def knows(self, p: Tensor) -> bool:
        """Whether a step has given the parameter a v."""
        optimizer, _ = self.places.get(p, (None, None))
        step = None if optimizer is None else optimizer.state.get(p, {}).get("step")
        count = None if step is None else as_count(step)
        return count is not None and (isinstance(count, Tensor) or count > 0)

    def root_at(self, p: Tensor, cut: Cut) -> Tensor | None:
        """sqrt(M) at some coordinates of a parameter, in float32 or wider; None without a v."""
        if not self.knows(p):
            return None
        optimizer, group = self.places[p]
        state = optimizer.state[p]
        v = moments_of(optimizer, group, state, lambda name: widen(cut(state[name])))
        root: Tensor = v.clamp_min(0).sqrt().add(group["eps"]).rsqrt()
        return root


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def moments_of(
    optimizer: Optimizer, group: dict[str, Any], state: Any, read: Callable[[str], Tensor]
) -> Tensor:
    """v, as the optimizer's step takes the root of it. read: gives a part of the state."""
    if isinstance(optimizer, Adagrad):
        return read("sum")
    if isinstance(optimizer, RMSprop):
        square = read("square_avg")
        return square - read("grad_avg") ** 2 if group["centered"] else square
    biased = read("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    correction = 1 - group["betas"][1] ** as_count(state["step"])
    return biased.div(correction)


def as_count(step: Any) -> Any:
    """An optimizer's count of steps as a number; on an accelerator it stays there, not to wait."""
    return step if isinstance(step, Tensor) and step.device.type != "cpu" else float(step)


def roots_of(
    policy: Policy,
    optimizers: Sequence[Optimizer],
    params: Sequence[Tensor],
    voters: Sequence[bool],
) -> list[Tensor | None] | None:
    """sqrt(M) of each parameter that votes and has a v, like it; None for a plain metric."""
    if metric_of(policy) != "optimizer":
        return None
    moments = SecondMoments(optimizers)
    pairs = zip(params, voters, strict=True)
    return [moments.root_at(p, lambda v: v) if votes else None for p, votes in pairs]


def check_metric(policy: Policy, optimizers: Sequence[Optimizer], subject: str) -> None:
    """TypeError for an optimizer without second moments, if the policy needs them."""
    if metric_of(policy) != "optimizer":
        return
    for optimizer in optimizers:
        if not isinstance(optimizer, Adam | RMSprop | Adagrad):
            raise TypeError(
                f"{subject}: metric='optimizer' needs the second moments of Adam, AdamW, RMSprop "
                f"or Adagrad; the optimizer is {type(optimizer).__name__}. Use one of these, "
                "metric='whitened', or leave metric out."
            )


def check_no_optimizer_metric(policy: Policy, subject: str, why: str) -> None:
    """ValueError for a policy with the optimizer's metric, where none is at hand."""
    if metric_of(policy) == "optimizer":
        raise ValueError(
            f"{subject}: metric='optimizer' works under gaf.Accumulator and gaf.attach with scope "
            f"'all' alone; {why}. Use metric='whitened', or leave metric out."
        )
