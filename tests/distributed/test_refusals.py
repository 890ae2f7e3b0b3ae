"""What gaf.attach refuses, with the way out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import attach_model
from helpers.problems import Odd
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def sync_batch_norm() -> tuple[Any, Any]:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    optimizer = SGD(model.parameters(), 0.1)
    norm = nn.SyncBatchNorm(4)  # DDP itself takes it on a GPU only
    norm.weight, norm.bias = model.module[1].weight, model.module[1].bias
    model.module[1] = norm
    return model, optimizer


def outside_optimizer() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    return model, SGD(model.module.first.parameters(), 0.1)


def other_hook() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model.register_comm_hook(None, allreduce_hook)
    return model, SGD(model.parameters(), 0.1)


def attach_twice() -> tuple[Any, Any]:
    model, optimizer, _ = attach_model(gaf.GAF())
    return model, optimizer


def optimizer_in_backward() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    for p in model.parameters():
        p._in_backward_optimizers = []  # what apply_optimizer_in_backward leaves
    return model, SGD(model.parameters(), 0.1)


def wrap(make: Callable[[], nn.Module], **ddp: Any) -> tuple[Any, Any]:
    model = DistributedDataParallel(make(), **ddp)
    return model, SGD(model.parameters(), 0.1)


def overlapping_optimizer() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
    optimizer._overlap_with_ddp = True
    return model, optimizer


def closure_optimizer() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    return model, torch.optim.LBFGS(model.parameters())


def bare_model() -> tuple[Any, Any]:
    model = Odd()
    return model, SGD(model.parameters(), 0.1)


def python_reducer() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    model._use_python_reducer = True
    return model, SGD(model.parameters(), 0.1)


def mixed_precision() -> tuple[Any, Any]:
    model = DistributedDataParallel(Odd())
    model.mixed_precision = object()
    return model, SGD(model.parameters(), 0.1)


REFUSALS: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any], str]] = {
    "bare": (bare_model, {}, "must be data parallel.*got Odd.*gaf.Accumulator"),
    "outside": (outside_optimizer, {}, "must hold every trainable parameter.*'module.scale'"),
    "hook": (other_hook, {}, "no other communication hook; it has allreduce_hook"),
    "twice": (attach_twice, {}, "attached already"),
    "in backward": (optimizer_in_backward, {}, "must step after the backward pass"),
    "sync batch norm": (sync_batch_norm, {}, "SyncBatchNorm 'module.1' mixes"),
    "sparse": (
        partial(wrap, partial(nn.Embedding, 5, 3, sparse=True)),
        {},
        "must be dense; 'module' is sparse",
    ),
    "complex": (
        partial(wrap, partial(nn.Linear, 3, 3, dtype=torch.complex64)),
        {},
        "must be real",
    ),
    "overlap": (overlapping_optimizer, {}, "overlap_with_ddp=False"),
    "python reducer": (python_reducer, {}, "Python reducer"),
    "mixed precision": (mixed_precision, {}, "Use torch.autocast"),
    "micro group": (
        partial(wrap, Odd),
        {"micro_group": 3},
        r"divides the 2 ranks; got 3. Use one of \[1, 2\]",
    ),
    "policy": (partial(wrap, Odd), {"policy": gaf.GAF}, "attach: policy must be a callable"),
    "too many": (
        partial(wrap, Odd),
        {"policy": gaf.GAF(min_accepted=3)},
        "GAF.* needs 3, and there are 2. Lower min_accepted, or start more ranks",
    ),
    "too much trimmed": (
        partial(wrap, Odd),
        {"policy": gaf.TrimmedMean(1)},
        r"TrimmedMean\(.*needs 3, and there are 2. Lower trim, or start more ranks",
    ),
    "too many signs": (
        partial(wrap, Odd),
        {"policy": gaf.SignAgreement(4)},
        r"SignAgreement\(.*needs 4, and there are 2. Lower at_least, or start more ranks",
    ),
    "closure": (closure_optimizer, {}, "attach: the optimizer must not need a closure; LBFGS"),
    "group": (partial(wrap, Odd), {"group": "another"}, "must be the model's own process group"),
}


def check_refusal(name: str) -> None:
    make, options, message = REFUSALS[name]
    model, optimizer = make()
    options = options | ({"group": dist.new_group([0, 1])} if "group" in options else {})
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        gaf.attach(model, optimizer, **({"policy": gaf.GAF()} | options))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_with_the_way_out(world: World, name: str) -> None:
    world(2).run(check_refusal, name)


def disagree(what: str) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(Odd())
    if what == "parameters" and rank == 1:
        model.module.first.weight.requires_grad_(False)
    optimizer = SGD(model.parameters(), 0.1)
    policy = gaf.GAF(0.9 if what == "policy" and rank == 2 else 0.8)
    micro_group = 2 if what == "micro_group" and rank == 0 else 1
    expected = {
        "micro_group": "same micro_group; rank 0 of the group has 2, others 1",
        "policy": r"same policy; rank 2 of the group has GAF\(tau=0.9",
        "parameters": "same parameters; rank 1 .*trainable=False",
    }
    with pytest.raises(ValueError, match=expected[what]):
        gaf.attach(model, optimizer, policy, micro_group=micro_group)


@pytest.mark.parametrize("what", ["policy", "parameters", "micro_group"])
def test_ranks_that_disagree_are_told_which(world: World, what: str) -> None:
    world(3).run(disagree, what)
