"""Checks of what every engine is given: each refusal names a way that works."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


def check_optimizers(optimizer: Optimizer | Sequence[Optimizer], subject: str) -> list[Optimizer]:
    """The optimizers as a list.

    Raises:
        TypeError: for what is no optimizer, or one whose gradients cannot be filtered.
        ValueError: where they hold no parameter, or one twice.
    """
    given: Sequence[Any] = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers: list[Optimizer] = list(given)
    for one in optimizers:
        check_optimizer(one, subject)
    params = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    if not params or len(set(params)) != len(params):
        raise ValueError(
            f"{subject}: the optimizers must hold parameters, each of them once; got "
            f"{len(params)} entries with {len(set(params))} parameters."
        )
    return optimizers


def check_optimizer(optimizer: Any, subject: str) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{subject}: optimizer must be a torch.optim.Optimizer or a list of them; got {kind}. "
            "Pass the optimizer that the loop steps."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{subject}: the optimizer must not need a closure; {kind} evaluates the loss again "
            "during its step, and there is no one set of micro-gradients to filter. Use SGD, Adam "
            "or another of torch's dense first-order optimizers."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            f"{subject}: the optimizer must take dense gradients; got SparseAdam. "
            "Use Adam with sparse=False embeddings."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{subject}: the optimizer must have the step hooks of torch.optim.Optimizer; {kind} "
            f"wraps another one and has none. Pass {what_to_pass(optimizer)}."
        )


def what_to_pass(optimizer: Optimizer) -> str:
    """What to pass in place of an optimizer that wraps another."""
    if type(optimizer).__module__.partition(".")[0] == "accelerate":
        return (
            "what accelerator.prepare gave to gaf.integrations.accelerate.attach, "
            "or an optimizer that is not prepared"
        )
    for name, one in vars(optimizer).items():
        if isinstance(one, Optimizer):
            return f"its .{name} ({type(one).__name__})"
    return "the one inside"
