"""Contracts of the Accumulator's arguments: each refusal says what to use instead."""

import gc
import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Names = dict[nn.Parameter, str]

_scaler_users: WeakKeyDictionary[GradScaler, ref[Any]] = WeakKeyDictionary()

ACROSS_RANKS = "Accumulator works on one device, where micro-batches follow each other in time, and would filter each rank on its own"


def check_optimizers(optimizer: Optimizer | Sequence[Optimizer], subject: str) -> list[Optimizer]:
    given: Sequence[Any] = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers: list[Optimizer] = list(given)
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"{subject}: optimizer must be a torch.optim.Optimizer or a sequence of them; got {type(one).__name__}."
            )
        kind = type(one).__name__
        closure = inspect.signature(type(one).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"{subject}: the optimizer must not need a closure; {kind} evaluates the loss again during its step, "
                            "and there is no one set of micro-gradients to filter. Use SGD, Adam or another of torch's dense "
                            "first-order optimizers.")  # fmt: skip
        if isinstance(one, torch.optim.SparseAdam):
            raise TypeError(
                f"{subject}: the optimizer must take dense gradients; got SparseAdam. Use Adam with sparse=False embeddings."
            )
    params = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    if not params or len(set(params)) != len(params):
        raise ValueError(f"{subject}: the optimizers must hold parameters, each of them once; got {len(params)} entries with "
                         f"{len(set(params))} parameters.")  # fmt: skip
    return optimizers


def claim_scaler(scaler: GradScaler, user: Any) -> None:
    """Two macro-batches under way at once must not share a scaler: the first to step would change the other's scale."""
    other = _scaler_users.get(scaler, lambda: None)()
    if other is not None and other is not user and other.waiting:
        raise ValueError("Accumulator: scaler must serve one macro-batch at a time, for step() updates its scale; another Accumulator "
                         "has micro-gradients waiting under it. Call its step() first, or make a GradScaler for each.")  # fmt: skip
    _scaler_users[scaler] = ref(user)


def check_model(model: nn.Module | None, bn: str, names: Names) -> None:
    if bn not in ("all", "accepted"):
        raise ValueError(f"Accumulator: bn must be 'all' or 'accepted'; got {bn!r}.")
    if bn == "accepted" and model is None:
        raise ValueError(
            "Accumulator: bn='accepted' needs the model whose BatchNorm layers it holds still; got model=None. Pass model=."
        )
    if isinstance(model, DistributedDataParallel):
        raise_distributed("model is a DistributedDataParallel")
    if model is not None and not any(p in names for p in model.parameters()):
        raise ValueError(f"Accumulator: model must hold the optimizer's parameters; this {type(model).__name__} holds none of them. "
                         "Pass the model that is trained.")  # fmt: skip


def check_parameters(names: Names, params: list[nn.Parameter]) -> None:
    for p in params:
        if p.is_complex():
            raise TypeError(
                f"Accumulator: parameters must be real; {names[p]!r} is {p.dtype}. Use torch.view_as_real."
            )
        if hasattr(p, "device_mesh"):
            raise_distributed(f"parameter {names[p]!r} is a DTensor (FSDP2 or tensor parallel)")
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(f"Accumulator: parameters must be on one device; they are on {', '.join(devices)}. "
                         "Give each device's optimizer an Accumulator of its own.")  # fmt: skip
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mine = set(map(id, params))
        for thing in gc.get_objects():  # DDP leaves no mark on its parameters
            if issubclass(type(thing), DistributedDataParallel) and any(
                id(p) in mine for p in thing.parameters()
            ):
                raise_distributed(
                    "the optimizer's parameters belong to a DistributedDataParallel model"
                )


def raise_distributed(what: str) -> None:
    raise TypeError(f"Accumulator: {what}. {ACROSS_RANKS}. Filter across ranks with gaf.attach(model, optimizer, policy), "
                    "or unwrap the model (ddp.module) and train on one device.")  # fmt: skip


def raise_unusable(name: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise TypeError(
            f"Accumulator: gradients must be dense; that of {name!r} is {grad.layout}. Use nn.Embedding(..., sparse=False)."
        )
    raise RuntimeError(f"Accumulator: a backward pass must bring each parameter one gradient; {name!r} got two, from a backward pass "
                       "within the backward pass (a reentrant checkpoint or the like). Use one that is not reentrant.")  # fmt: skip


def check_policy(policy: Any, subject: str) -> Any:
    if isinstance(policy, type) or not callable(policy):
        raise TypeError(
            f"{subject}: policy must be a callable from a Gram matrix to a Decision; got {policy!r}. Use gaf.GAF(tau=0.97)."
        )
    return policy


def check_scope(policy: Any, model: nn.Module | None, bn: str, leave_out: Any) -> None:
    scope = getattr(policy, "scope", "all")
    if scope == "group":
        raise ValueError("Accumulator: the policy's scope must be 'all' or 'layer'; got 'group', which decides for each bucket or "
                         "parameter group of a data-parallel engine. Use gaf.attach, or leave scope out.")  # fmt: skip
    if scope == "layer" and (model is None or bn != "all" or leave_out is not None):
        raise ValueError("Accumulator: scope 'layer' needs the model, whose modules are the layers, and goes neither with bn='accepted' "
                         f"nor with leave_out, for no micro-batch is accepted as a whole; got "
                         f"model={'None' if model is None else 'given'}, bn={bn!r}, leave_out={leave_out!r}. "
                         "Pass model= alone, or leave scope out.")  # fmt: skip


def check_reentrant(loss: Tensor) -> None:
    """A reentrant checkpoint stays out of a backward pass that names its inputs: its parameters would lack gradients, silently."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError("Accumulator: activation checkpoints must not be reentrant; the loss went through one that is. "
                               "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False).")  # fmt: skip
        waiting.extend(following for following, _ in node.next_functions)


def layers_of(params: list[nn.Parameter], names: Names) -> dict[str, list[int]]:
    """The parameters' indices by the module that they are of."""
    found: dict[str, list[int]] = {}
    for j, p in enumerate(params):
        found.setdefault(names[p].rpartition(".")[0] or names[p], []).append(j)
    return found


def names_of(optimizers: list[Optimizer], model: nn.Module | None) -> Names:
    """A name for every parameter: the model's, where it has one, else its place in the optimizer."""
    names = {
        p: f"{j} of group {i}" + (f" of optimizer {n}" if len(optimizers) > 1 else "")
        for n, optimizer in enumerate(optimizers)
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    }
    return names | {
        p: name for name, p in (model.named_parameters() if model is not None else ()) if p in names
    }
