"""Gradients that hold an update when a backward pass begins."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import (
    RATE,
    Heads,
    difference,
    head_loss,
    loss,
    momentum,
    net,
    train_plainly,
    values,
)
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def weigh_by_gradient_norms() -> None:
    """torch.autograd.grad after the forward pass, as VQGAN and GradNorm weigh their losses."""
    ends = []
    for filtered in (False, True):
        model = net(6, 8, 3)
        wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
        if filtered:
            gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
        for step in range(3):
            value = loss(wrapped, step)
            asked = torch.autograd.grad(value, model[2].weight, retain_graph=True)[0]
            optimizer.zero_grad()
            (value * (1 + 0.1 * asked.norm().detach())).backward()
            optimizer.step()
        ends.append(values(model))
    assert difference(*ends) < 1e-6


def test_gradients_that_are_only_asked_for_are_no_accumulation(world: World) -> None:
    world(2).run(weigh_by_gradient_norms)


def look_at_saliency() -> None:
    """The same under FSDP2, with respect to the input, while the last update is still there."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"])
    for step in range(3):
        x = torch.ones(2, 6, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 3


def test_fsdp2_too_may_be_asked_for_gradients(world: World) -> None:
    world(2).run(look_at_saliency)


def leave_the_body_uncleared() -> None:
    torch.manual_seed(0)
    model = Heads()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    body, heads = (SGD(part.parameters(), RATE) for part in (model.body, model.heads))
    gaf.attach(wrapped, [body, heads], gaf.GAF(2.0))
    head_loss(wrapped, 0, 0).backward()
    body.step()
    heads.step()
    heads.zero_grad()
    with pytest.raises(RuntimeError, match="must be cleared before a backward pass"):
        head_loss(wrapped, 1, 1).backward()


def test_one_uncleared_optimizer_of_two_is_noticed(world: World) -> None:
    ranks = world(2)
    ranks.run(leave_the_body_uncleared)
    ranks.broken = True  # DDP's own state is that of a pass that an exception ended


def clear_with_zeros() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        with wrapped.no_sync():
            (0.0 * loss(wrapped, step)).backward()
        loss(wrapped, step).backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 4
    assert difference(values(model), train_plainly(range(4))) < 1e-6


def test_gradients_filled_with_zeros_are_cleared(world: World) -> None:
    world(2).run(clear_with_zeros)


def break_off_a_pass() -> None:
    """A pass onto an update, ended by an exception, leaves nothing once gradients are cleared."""
    model = net(6, 8, 3)
    wrapped, optimizer = (
        DistributedDataParallel(model, find_unused_parameters=True),
        momentum(model),
    )
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    loss(wrapped, 0).backward()
    optimizer.step()
    hook = model[0].weight.register_hook(lambda grad: 1 / 0)
    with wrapped.no_sync():
        value = loss(wrapped, 1)
    with pytest.raises(ZeroDivisionError), wrapped.no_sync():
        value.backward()
    hook.remove()
    optimizer.zero_grad()
    loss(wrapped, 1).backward()
    optimizer.step()
    assert handle.stats()["stepped"] == 2


def test_a_pass_that_an_exception_ended_raises_no_alarm_later(world: World) -> None:
    world(2).run(break_off_a_pass)


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def judge(self, x: Tensor) -> Tensor:
        return self.inner(x)


def call_another_forward_method() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = Methods()
    fully_shard(model, mesh=mesh["shard"])
    register_fsdp_forward_method(model, "judge")
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"].get_group())
    for step in range(2):
        optimizer.zero_grad()
        loss(model.judge, step).backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 2
    loss(model.judge, 2).backward()
    with pytest.raises(RuntimeError, match="must be cleared before a backward pass"):
        optimizer.step()


def test_a_forward_method_of_fsdp2_is_watched_too(world: World) -> None:
    world(2).run(call_another_forward_method)
