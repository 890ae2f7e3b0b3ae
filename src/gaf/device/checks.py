"""What the Accumulator refuses; each message names a way that works."""

import gc
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from gaf.rules.contract import check_policy, scope_of
from gaf.rules.decision import Decision

Names = dict[nn.Parameter, str]


def variable(subject: str) -> str:
    """What examples in messages call the object."""
    return {"Accumulator": "acc"}.get(subject, subject.lower())


def check_types(model: Any, scaler: Any, leave_out: Any, subject: str) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"{subject}: model must be a torch.nn.Module or None; got {text_of(model)}. "
            "Pass the model that is trained."
        )
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"{subject}: scaler must be a torch.amp.GradScaler or None; got "
            f"{text_of(scaler)}. Use torch.amp.GradScaler(device)."
        )
    if leave_out is not None and (isinstance(leave_out, type) or not callable(leave_out)):
        raise TypeError(
            f"{subject}: leave_out must be a function of a parameter's name and the parameter, or "
            f"None; got {text_of(leave_out)}. "
            "Use such as lambda name, p: name.startswith('embed')."
        )


def check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            "Accumulator: backward() needs the loss of one micro-batch, a tensor of one number; "
            f"got {text_of(loss)}. Pass what the loss function returns, not its .item(), and "
            "several losses added up or one by one."
        )
    if loss.numel() != 1 or not loss.dtype.is_floating_point:
        raise ValueError(
            "Accumulator: the loss must be one real number, the mean over its micro-batch; got "
            f"shape {tuple(loss.shape)} of {loss.dtype}. Use reduction='mean', or .mean()."
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "Accumulator: the loss must depend on parameters by operations that autograd has seen; "
            "it does not require grad. Compute it outside of torch.no_grad(), from outputs that "
            "are not detached."
        )


def text_of(value: Any) -> str:
    """A value's type, and the value where it is short."""
    text = repr(value)
    return type(value).__name__ + (f" {text}" if len(text) < 40 else "")


def check_bn(bn: str, model: nn.Module | None) -> None:
    if bn not in ("all", "accepted"):
        raise ValueError(f"Accumulator: bn must be 'all' or 'accepted'; got {bn!r}.")
    if bn == "accepted" and model is None:
        raise ValueError(
            "Accumulator: bn='accepted' needs the model whose BatchNorm layers it holds still; "
            "got model=None. Pass model=."
        )


def check_accumulator_model(model: nn.Module, names: Names, subject: str) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise_distributed("model is a DistributedDataParallel, or holds one", subject)
    if not any(p in names for p in model.parameters()):
        raise ValueError(
            f"{subject}: model must hold the optimizer's parameters; this "
            f"{type(model).__name__} holds none of them. Pass the model that is trained."
        )


def check_scope(scope: str, model: nn.Module | None, bn: str, leave_out: Any) -> None:
    if scope == "group":
        raise ValueError(
            "Accumulator: the policy's scope must be 'all' or 'layer'; got 'group', which decides "
            "for each bucket or parameter group of a data-parallel engine. Use gaf.attach, or "
            "leave scope out."
        )
    if scope == "layer" and (model is None or bn != "all" or leave_out is not None):
        raise ValueError(
            "Accumulator: scope 'layer' needs the model, whose modules are the layers, and goes "
            "neither with bn='accepted' nor with leave_out, because no micro-batch is accepted as "
            f"a whole; got model={'None' if model is None else 'given'}, bn={bn!r}, "
            f"leave_out={leave_out!r}. Pass model= alone, or leave scope out."
        )


def check_new_policy(policy: Any, given: tuple[Any, str, Any], waiting: bool, subject: str) -> None:
    """Refuses a policy as the constructor would (given: model, bn, leave_out), and between rows."""
    check_policy(policy, subject)
    check_scope(scope_of(policy), *given)
    if waiting:
        raise RuntimeError(
            f"{subject}: a new policy must come between steps; micro-gradients wait for their "
            "step(). Call step() or discard() first."
        )


def check_parameters(names: Names, params: list[nn.Parameter], subject: str) -> None:
    for p in params:
        check_parameter(names[p], p, subject)
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(
            f"{subject}: parameters must be on one device; they are on {', '.join(devices)}. "
            "Give each device an optimizer and such an object of its own."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        check_engines(params, subject)


def check_parameter(name: str, p: nn.Parameter, subject: str) -> None:
    if p.is_complex():
        raise TypeError(
            f"{subject}: parameters must be real; {name!r} is {p.dtype}. Use torch.view_as_real."
        )
    if hasattr(p, "device_mesh"):
        raise_distributed(f"parameter {name!r} is a DTensor (FSDP2 or tensor parallel)", subject)
    if getattr(p, "_is_flat_param", False):
        raise_distributed(
            f"parameter {name!r} belongs to a FullyShardedDataParallel (FSDP1) model", subject
        )
    if hasattr(p, "_in_backward_optimizers"):
        raise TypeError(
            f"{subject}: the optimizer must step after the backward pass; that of {name!r} was "
            "applied in it (apply_optimizer_in_backward). Use an ordinary optimizer."
        )


def check_engines(params: list[nn.Parameter], subject: str) -> None:
    """Refuses parameters of a data-parallel model, which show no public sign of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    mine = set(map(id, params))
    for thing in gc.get_objects():
        engine = issubclass(type(thing), DistributedDataParallel | FullyShardedDataParallel)
        if engine and any(id(p) in mine for p in thing.parameters()):
            raise_distributed(
                f"the optimizer's parameters belong to a {type(thing).__name__} model", subject
            )


def raise_distributed(what: str, subject: str) -> NoReturn:
    raise TypeError(
        f"{subject}: {what}. {subject} works on one device, where micro-batches follow each other "
        "in time, and would filter each rank on its own. Filter across ranks with "
        "gaf.attach(model, optimizer, policy) (DistributedDataParallel, FSDP2), or unwrap the "
        "model (ddp.module) and train on one device."
    )


def check_accumulator_state(state: Any, subject: str) -> None:
    if not isinstance(state, dict) or not state.keys() >= {"telemetry", "policy"}:
        found = sorted(state) if isinstance(state, dict) else text_of(state)
        raise ValueError(
            f"{subject}: load_state_dict() takes what state_dict() gave, with 'telemetry' and "
            f"'policy'; got {found}. Save {variable(subject)}.state_dict() under a key of its own."
        )


def check_idle(waiting: bool, call: str, subject: str) -> None:
    """RuntimeError if micro-gradients wait for their step."""
    if waiting:
        raise RuntimeError(
            f"{subject}: {call} must come between macro-batches; micro-gradients wait and "
            "would be lost. Call step() first, or discard() to drop them."
        )


def check_undecided(decided: Decision | None, call: str, subject: str) -> None:
    """RuntimeError if the macro-batch is decided, and waits for its step."""
    if decided is not None:
        raise RuntimeError(
            f"{subject}: {call} came after decide(); call step() first, it ends the "
            "macro-batch, whose decision is counted."
        )


def raise_nothing_waits(subject: str) -> NoReturn:
    raise RuntimeError(
        f"{subject}: a decision needs at least one backward() before it; got none since the last "
        f"step. Call {variable(subject)}.backward() in place of loss.backward()."
    )
