"""Contracts of the Accumulator's arguments: each refusal says what to use instead."""

import gc
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

Names = dict[nn.Parameter, str]

_scaler_users: WeakKeyDictionary[GradScaler, ref[Any]] = WeakKeyDictionary()

# what wrappers call the module inside: torch.compile, Fabric, activation checkpoints; "module" may be a model's own name
WRAPPED = ("_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "module")
WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)

ACROSS_RANKS = "Accumulator works on one device, where micro-batches follow each other in time, and would filter each rank on its own"


def check_optimizers(optimizer: Optimizer | Sequence[Optimizer], subject: str) -> list[Optimizer]:
    given: Sequence[Any] = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers: list[Optimizer] = list(given)
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"{subject}: optimizer must be a torch.optim.Optimizer or a list of them; got {type(one).__name__}. "
                "Pass the optimizer that the loop steps."
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
        if not hasattr(one, "_optimizer_step_pre_hooks"):
            raise TypeError(f"{subject}: the optimizer must have the step hooks of torch.optim.Optimizer; {kind} wraps another one and has "
                            f"none. Pass {what_to_pass(one)}.")  # fmt: skip
    params = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    if not params or len(set(params)) != len(params):
        raise ValueError(f"{subject}: the optimizers must hold parameters, each of them once; got {len(params)} entries with "
                         f"{len(set(params))} parameters.")  # fmt: skip
    return optimizers


def what_to_pass(optimizer: Optimizer) -> str:
    """What to pass in place of an optimizer that wraps another."""
    found = [(name, one) for name, one in vars(optimizer).items() if isinstance(one, Optimizer)]
    if type(optimizer).__module__.partition(".")[0] == "accelerate":
        return "what accelerator.prepare gave to gaf.integrations.accelerate.attach, or an optimizer that is not prepared"
    return f"its .{found[0][0]} ({type(found[0][1]).__name__})" if found else "the one inside"


def claim_scaler(scaler: GradScaler, user: Any) -> None:
    """Two macro-batches under way at once must not share a scaler: the first to step would change the other's scale."""
    other = _scaler_users.get(scaler, lambda: None)()
    if other is not None and other is not user and other.waiting:
        raise ValueError("Accumulator: scaler must serve one macro-batch at a time, for step() updates its scale; another Accumulator "
                         "has micro-gradients waiting under it. Call its step() first, or make a GradScaler for each.")  # fmt: skip
    _scaler_users[scaler] = ref(user)


def check_types(model: Any, scaler: Any, leave_out: Any) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"Accumulator: model must be a torch.nn.Module or None; got {text_of(model)}. Pass the model that is trained."
        )
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"Accumulator: scaler must be a torch.amp.GradScaler or None; got {text_of(scaler)}. Use torch.amp.GradScaler(device)."
        )
    if leave_out is not None and (isinstance(leave_out, type) or not callable(leave_out)):
        raise TypeError("Accumulator: leave_out must be a function of a parameter's name and the parameter, or None; got "
                        f"{text_of(leave_out)}. Use such as lambda name, p: name.startswith('embed').")  # fmt: skip


def check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"Accumulator: backward() needs the loss of one micro-batch, a tensor of one number; got {text_of(loss)}. Pass "
                        "what the loss function returns, not its .item(), and several losses added up or one by one.")  # fmt: skip
    if loss.numel() != 1 or not loss.dtype.is_floating_point:
        raise ValueError("Accumulator: the loss must be one real number, the mean over its micro-batch; got shape "
                         f"{tuple(loss.shape)} of {loss.dtype}. Use reduction='mean', or .mean().")  # fmt: skip
    if not loss.requires_grad:
        raise RuntimeError("Accumulator: the loss must depend on parameters by operations that autograd has seen; it does not require "
                           "grad. Compute it outside of torch.no_grad(), from outputs that are not detached.")  # fmt: skip


def text_of(value: Any) -> str:
    """A value's type, and the value where it is short."""
    text = repr(value)
    return type(value).__name__ + (f" {text}" if len(text) < 40 else "")


def check_model(model: nn.Module | None, bn: str, names: Names) -> None:
    if bn not in ("all", "accepted"):
        raise ValueError(f"Accumulator: bn must be 'all' or 'accepted'; got {bn!r}.")
    if bn == "accepted" and model is None:
        raise ValueError(
            "Accumulator: bn='accepted' needs the model whose BatchNorm layers it holds still; got model=None. Pass model=."
        )
    if model is not None and any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise_distributed("model is a DistributedDataParallel, or holds one")
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
        if getattr(p, "_is_flat_param", False):
            raise_distributed(
                f"parameter {names[p]!r} belongs to a FullyShardedDataParallel (FSDP1) model"
            )
        if hasattr(p, "_in_backward_optimizers"):
            raise TypeError(f"Accumulator: the optimizer must step after the backward pass; that of {names[p]!r} was applied in it "
                            "(apply_optimizer_in_backward). Use an ordinary optimizer.")  # fmt: skip
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(f"Accumulator: parameters must be on one device; they are on {', '.join(devices)}. "
                         "Give each device's optimizer an Accumulator of its own.")  # fmt: skip
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        check_engines(params)


def check_engines(params: list[nn.Parameter]) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    mine = set(map(id, params))
    for thing in gc.get_objects():  # neither leaves a mark on the parameters that a user sees
        if issubclass(type(thing), DistributedDataParallel | FullyShardedDataParallel) and any(
            id(p) in mine for p in thing.parameters()
        ):
            raise_distributed(
                f"the optimizer's parameters belong to a {type(thing).__name__} model"
            )


def raise_distributed(what: str) -> NoReturn:
    raise TypeError(f"Accumulator: {what}. {ACROSS_RANKS}. Filter across ranks with gaf.attach(model, optimizer, policy) "
                    "(DistributedDataParallel, FSDP2), or unwrap the model (ddp.module) and train on one device.")  # fmt: skip


def raise_unusable(name: str, grad: Tensor | None) -> NoReturn:
    if grad is None:
        raise RuntimeError(f"Accumulator: a backward pass must leave each gradient in p.grad; that of {name!r} was taken by a hook, such "
                           "as one that steps an optimizer during the backward pass. Leave the hook out.")  # fmt: skip
    if grad.layout != torch.strided:
        raise TypeError(
            f"Accumulator: gradients must be dense; that of {name!r} is {grad.layout}. Use nn.Embedding(..., sparse=False)."
        )
    raise RuntimeError(f"Accumulator: a backward pass must bring each parameter one gradient; {name!r} got two, from a backward pass "
                       "within the backward pass (a reentrant checkpoint or the like). Use one that is not reentrant.")  # fmt: skip


def raise_untouched(names: Names) -> NoReturn:
    some = next(iter(names.values()))
    raise RuntimeError(f"Accumulator: the loss must depend on the optimizer's parameters; none of the {len(names)}, such as {some!r}, got "
                       "a gradient. Make the optimizer from the parameters of the model that is trained, after it was moved, copied or "
                       "wrapped, and leave losses out that depend on none of them.")  # fmt: skip


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


def check_state(state: Any) -> None:
    if not isinstance(state, dict) or not state.keys() >= {"telemetry", "policy"}:
        found = sorted(state) if isinstance(state, dict) else text_of(state)
        raise ValueError("Accumulator: load_state_dict() takes what an Accumulator's state_dict() gave, with 'telemetry' and 'policy'; got "
                         f"{found}. Save acc.state_dict() under a key of its own.")  # fmt: skip


def check_voters(
    voters: list[bool], params: list[nn.Parameter], names: Names, matched: bool, model: Any
) -> None:
    """Args: matched: whether leave_out was true for some parameter, now or before, or there is none."""
    if not matched:
        fix = (
            "Leave it out, or match such a name"
            if model is not None
            else "Pass model= for the model's own names"
        )
        raise ValueError("Accumulator: leave_out must be true for at least one parameter; it is for none, and is given names such as "
                         f"{names[params[0]]!r}. {fix}.")  # fmt: skip
    if not any(voters):
        raise ValueError(
            "Accumulator: leave_out must leave at least one parameter to decide on; it is true for all of them."
        )


def check_reentrant(loss: Tensor) -> None:
    """A reentrant checkpoint stays out of a backward pass that names its inputs: its parameters would lack gradients, silently."""
    if goes_through(loss, "CheckpointFunctionBackward"):
        raise RuntimeError("Accumulator: activation checkpoints must not be reentrant; the loss went through one that is. "
                           "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False).")  # fmt: skip


def goes_through(loss: Tensor, *words: str) -> bool:
    """Whether the name of an operation in the loss's graph has one of the words in it."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(word in node.name() for word in words):
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False


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
    return names | {p: name for name, p in bare_names(model) if p in names}


def bare_names(model: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters by the names that they have without wrappers: torch.compile, nn.DataParallel and their like."""
    if model is None:
        return []
    hidden = {
        f"{path}.{inside}".lstrip(".") for path, m in model.named_modules() for inside in WRAPPED
        if inside in m._modules and (inside != "module" or isinstance(m, WRAPPERS))
    }  # fmt: skip

    def bare(name: str) -> str:
        parts = name.split(".")
        return ".".join(
            part for i, part in enumerate(parts, 1) if ".".join(parts[:i]) not in hidden
        )

    return [(bare(name), p) for name, p in model.named_parameters()]
