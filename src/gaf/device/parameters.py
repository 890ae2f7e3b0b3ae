"""The parameters that an Accumulator filters, their names, and which of them decide."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from gaf.device.buffers import Buffers
from gaf.device.checks import Names, check_accumulator_model, check_parameters, variable

LeaveOut = Callable[[str, nn.Parameter], bool]

# The names by which wrappers hold the module inside: torch.compile, Fabric, activation checkpoints.
# A model of its own may have a "module" too, so that one counts in the WRAPPERS only.
WRAPPED = ("_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "module")
WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


class Parameters:
    """The optimizers' parameters, looked up when a macro-batch begins.

    Between macro-batches, groups may be added and layers frozen or thawed.

    Args:
        optimizers: that share one decision.
        model: gives the parameters their names; None for names by place.
        leave_out: true for the parameters that do not decide; None where all decide.
        subject: of messages.

    Attributes:
        names: of every parameter.
        current: the parameters of the macro-batch in progress, in the optimizers' order.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: nn.Module | None,
        leave_out: LeaveOut | None,
        subject: str = "Accumulator",
    ) -> None:
        self.optimizers, self.model, self.leave_out = optimizers, model, leave_out
        self.subject = subject
        self.names = names_of(optimizers, model)
        self.current: list[nn.Parameter] = []
        self._ever_left_out = leave_out is None
        if model is not None:
            check_accumulator_model(model, self.names, subject)
        check_parameters(self.names, all_parameters(optimizers), subject)

    def __len__(self) -> int:
        return len(self.current)

    def name(self, j: int) -> str:
        return self.names[self.current[j]]

    def refresh(self) -> None:
        """Looks the parameters up."""
        params = all_parameters(self.optimizers)
        if list(map(id, params)) != list(map(id, self.current)):
            self.names = names_of(self.optimizers, self.model)
            check_parameters(self.names, params, self.subject)
        self.current = params

    def voters(self) -> list[bool]:
        """Which parameters decide.

        Raises:
            ValueError: where leave_out was never true for any, or is true for all.
        """
        if self.leave_out is None:
            return [True] * len(self)
        voters = [not self.leave_out(self.names[p], p) for p in self.current]
        self._ever_left_out = self._ever_left_out or not all(voters)
        if not self._ever_left_out:
            fix = "Leave it out, or match such a name"
            if self.model is None:
                fix = "Pass model= for the model's own names"
            raise ValueError(
                f"{self.subject}: leave_out must be true for at least one parameter; it is for "
                f"none, and is given names such as {self.name(0)!r}. {fix}."
            )
        if not any(voters):
            raise ValueError(
                f"{self.subject}: leave_out must leave at least one parameter to decide on; "
                "it is true for all of them."
            )
        return voters

    def check_clean(self) -> None:
        """RuntimeError where a parameter already has a gradient."""
        for p in self.current:
            if p.grad is not None:
                raise RuntimeError(
                    f"{self.subject}: parameter {self.names[p]!r} must have no gradient before "
                    "backward(); it has one, from a loss.backward() elsewhere or a "
                    "zero_grad(set_to_none=False). Give every loss of this optimizer to "
                    f"{variable(self.subject)}.backward(), and clear strays with "
                    "optimizer.zero_grad()."
                )

    def place(self, update: Sequence[Tensor | None]) -> None:
        """Puts the update into p.grad."""
        for p, grad in zip(self.current, update, strict=True):
            p.grad = None if grad is None else grad.to(grad_dtype(p) or grad.dtype)

    def take_gradients(self) -> Buffers:
        """The gradients, taken out of p.grad."""
        row = [p.grad for p in self.current]
        self.clear()
        return row

    def clear(self) -> None:
        for p in self.current:
            p.grad = None


def all_parameters(optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [p for group in groups for p in group["params"]]


def grad_dtype(p: Tensor) -> torch.dtype | None:
    """What p.grad must have; None for any."""
    return getattr(p, "grad_dtype", p.dtype)


def names_of(optimizers: Sequence[Optimizer], model: nn.Module | None) -> Names:
    """A name for every parameter: the model's, where it has one, else its place."""
    names: Names = {}
    for n, optimizer in enumerate(optimizers):
        which = f" of optimizer {n}" if len(optimizers) > 1 else ""
        for i, group in enumerate(optimizer.param_groups):
            names |= {p: f"{j} of group {i}{which}" for j, p in enumerate(group["params"])}
    return names | {p: name for name, p in bare_names(model) if p in names}


def bare_names(model: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters by the names that they have without wrappers.

    Wrappers are torch.compile, nn.DataParallel and their like.
    """
    if model is None:
        return []
    hidden = set()
    for path, module in model.named_modules():
        wrapped = [inside for inside in WRAPPED if holds_wrapped(module, inside)]
        hidden |= {f"{path}.{inside}".lstrip(".") for inside in wrapped}

    def bare(name: str) -> str:
        parts = name.split(".")
        paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return ".".join(part for part, path in zip(parts, paths, strict=True) if path not in hidden)

    return [(bare(name), p) for name, p in model.named_parameters()]


def holds_wrapped(module: nn.Module, inside: str) -> bool:
    """Whether the module is a wrapper that holds another one by the name `inside`."""
    return inside in module._modules and (inside != "module" or isinstance(module, WRAPPERS))
