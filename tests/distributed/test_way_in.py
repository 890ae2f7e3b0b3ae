"""HSDP: the gradients that are sent during the pass give the bits of sending all after it."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

import gaf
from gaf.ranks import way_in
from gaf.ranks.exchange import Exchange
from gaf.ranks.way_in import WayIn
from helpers.problems import batch, close, micro_gradients, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


class Broken(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("broken")


class Branches(nn.Module):
    """Branches in any order, or left out; layers that are cut into slices, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(13, 257), nn.Linear(257, 5)
        self.left, self.right = nn.Linear(257, 257), nn.Linear(257, 257)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, branches: str = "LR", how: str = "") -> Tensor:
        h = torch.tanh(self.first(x))
        h = Broken.apply(h) if how == "broken" else h
        for branch in branches:
            layer = self.left if branch == "L" else self.right
            h = checkpoint(layer, h, use_reentrant=True) if how == "nested" else layer(h)
            h = torch.tanh(h)
        scores: Tensor = self.last(h) * self.scale
        return scores


# the model, its optimizer, the handle, and the replica
Setting = tuple[Any, torch.optim.Optimizer, gaf.Handle, int]


def loss(model: Any, step: int, branches: str = "LR", how: str = "") -> Tensor:
    x, y = batch(step, dist.get_rank())
    return nn.functional.cross_entropy(model(x, branches, how), y)


def plain(setting: Setting, step: int) -> None:
    loss(setting[0], step).backward()


def other_order(setting: Setting, step: int) -> None:
    """The replicas' passes reach the branches in different orders."""
    loss(setting[0], step, ("LR", "RL")[setting[3] % 2]).backward()


def left_out(setting: Setting, step: int) -> None:
    """Each replica leaves out another branch; then one leaves both; then all leave out one."""
    one, two = (("L", "R"), ("LR", ""), ("R", "R"))[step % 3]
    loss(setting[0], step, (one, two)[setting[3] % 2]).backward()


def accumulated(setting: Setting, step: int) -> None:
    model = setting[0]
    model.set_requires_gradient_sync(False)
    loss(model, step + 100).backward()
    model.set_requires_gradient_sync(True)
    loss(model, step).backward()


def cleared_with_zeros(setting: Setting, step: int) -> None:
    setting[1].zero_grad(set_to_none=False)
    loss(setting[0], step).backward()


def two_passes(setting: Setting, step: int) -> None:
    """They share a step, and the second adds to what the first has left."""
    loss(setting[0], step, "L").backward()
    loss(setting[0], step + 100, "LR").backward()
    setting[1].zero_grad()
    loss(setting[0], step, "R").backward()


def asked_for(setting: Setting, step: int) -> None:
    x = torch.ones(2, 13, requires_grad=True)
    torch.autograd.grad(setting[0](x).sum(), x)
    loss(setting[0], step).backward()
    torch.autograd.grad(setting[0](x).sum(), x)


def nested(setting: Setting, step: int) -> None:
    """Backward passes within the backward pass: one decision covers all."""
    loss(setting[0], step).backward()
    expected = bits(setting[0])
    setting[1].zero_grad()
    loss(setting[0], step, how="nested").backward()
    pairs: Any = zip(bits(setting[0]), expected, strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def frozen(setting: Setting, step: int) -> None:
    for p in setting[0].left.parameters():
        p.requires_grad_(step % 2 == 1)
    loss(setting[0], step).backward()


def hooked(setting: Setting, step: int) -> None:
    """Hooks that came after attach's change a gradient: its own, a neighbour's, another layer's."""
    layer, first = setting[0].right, setting[0].first

    def double(p: Any) -> None:
        p.grad.data.mul_(2.0)

    def double_neighbour(p: Any) -> None:
        layer.weight.grad.data.mul_(2.0)

    def double_other(p: Any) -> None:
        layer.bias.grad.mul_(2.0)

    pairs: Any = (layer.weight, double), (layer.bias, double_neighbour), (first.bias, double_other)
    hooks = [p.register_post_accumulate_grad_hook(hook) for p, hook in pairs]
    loss(setting[0], step).backward()
    for hook in hooks:
        hook.remove()


def broken(setting: Setting, step: int) -> None:
    """An exception ends a pass of all replicas."""
    with pytest.raises(ArithmeticError):
        loss(setting[0], step, how="broken").backward()
    setting[0].reset_iter_state()
    setting[1].zero_grad()
    loss(setting[0], step).backward()


def broken_on_one(setting: Setting, step: int) -> None:
    """An exception ends a pass of one replica, which takes part with its next one."""
    if setting[3] == 1:
        broken(setting, step)
    else:
        loss(setting[0], step).backward()


WAYS = (
    *(plain, other_order, left_out, accumulated, cleared_with_zeros, two_passes, asked_for),
    *(nested, frozen, hooked, broken, broken_on_one),
)


def shard_branches(mesh: DeviceMesh, **more: Any) -> Any:
    torch.manual_seed(5)
    model = Branches()
    for module in (model.first, model.left, model.right, model.last):
        fully_shard(module, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def bits(model: nn.Module) -> list[Tensor | None]:
    """This rank's shards, and those of their gradients."""
    params: list[Any] = list(model.parameters())
    grads = [None if p.grad is None else p.grad.to_local().clone() for p in params]
    return [p.detach().to_local().clone() for p in params] + grads


def train(mesh: DeviceMesh, micro_group: int, early: bool, **more: Any) -> tuple[Any, list[int]]:
    """What every step has left, and how many parameters were sent before the pass was over."""
    model = shard_branches(mesh["shard"], **more)
    optimizer = AdamW(model.parameters(), 0.01)
    handle = gaf.attach(
        model, optimizer, gaf.GAF(), group=mesh["replicate"], micro_group=micro_group
    )
    setting = (model, optimizer, handle, mesh["replicate"].get_local_rank())
    left: list[Any] = []
    sent: list[int] = []
    agree = WayIn.agree

    def counting(way: WayIn) -> Any:
        sent.append(len(way._sent))
        return agree(way)

    held = mock.patch.object(way_in, "is_offloaded", return_value=not early)
    with held, mock.patch.object(WayIn, "agree", counting):
        for step, (way, tau) in enumerate(itertools.product(WAYS, (2.0, 0.3, 2.0))):
            handle.policy = gaf.GAF(tau)
            optimizer.zero_grad()
            way(setting, step)
            assert handle.last is not None
            left.append([*bits(model), handle.last.distances, handle.last.weights])
            for p in model.parameters():
                p.requires_grad_()
            optimizer.step()
            left.append([*bits(model), torch.tensor(handle.stats()["stepped"])])
    same_everywhere(*left[-2][-2:])
    handle.detach()
    return left, sent


def compare(replicas: int, shards: int, micro_group: int, **more: Any) -> None:
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    ours, sent = train(mesh, micro_group, early=True, **more)
    base, none_sent = train(mesh, micro_group, early=False, **more)
    for step, (a, b) in enumerate(zip(ours, base, strict=True)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same = x is y or (x is not None and y is not None and torch.equal(x, y))
            assert same or bool(x.isnan().any()), f"{WAYS[step // 6].__name__}: {step}, {i}"
    assert sum(none_sent) == 0
    assert sent[2] == 9  # of all parameters
    assert sum(number > 0 for number in sent) > len(sent) / 2


@pytest.mark.parametrize(
    ("replicas", "shards", "micro_group"),
    [(2, 1, 1), (2, 2, 1), pytest.param(4, 1, 2, marks=pytest.mark.slow)],
)
def test_sending_early_gives_the_same_bits(
    world: World, replicas: int, shards: int, micro_group: int
) -> None:
    world(replicas * shards).run(compare, replicas, shards, micro_group)


def compare_offloaded() -> None:
    compare(2, 1, 1, offload_policy=CPUOffloadPolicy(pin_memory=False))


@pytest.mark.slow
def test_gradients_on_the_host(world: World) -> None:
    world(2).run(compare_offloaded)


class Parts(nn.Module):
    """FSDP2 keeps account of each part, because their whole is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(13, 129), nn.Tanh(), nn.Linear(129, 129))
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(129, 5))


def parts_loss(model: Any, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank)
    return nn.functional.cross_entropy(model.head(model.body(x)), y)


def call_parts() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(5)
    model: Any = Parts()
    for part in (model.body[0], model.body, model.head, model):
        fully_shard(part, mesh=mesh["shard"])
    optimizer = AdamW(model.parameters(), 0.01)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"])
    twin = Parts()
    for step in range(4):
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p.to_local())
        rows = micro_gradients(twin, step, 2, parts_loss)
        optimizer.zero_grad()
        parts_loss(model, step, dist.get_rank()).backward()
        grads = [p.grad.to_local().double().reshape(-1) for p in model.parameters()]
        close(torch.cat(grads), rows.mean(0), rows)
        optimizer.step()
    assert handle.stats()["steps"] == 4


def test_parts_that_are_called_by_themselves(world: World) -> None:
    """One decision covers a pass through several of them."""
    world(2).run(call_parts)


def test_a_gradient_outside_of_a_pass_is_refused() -> None:
    way: Any = WayIn(Exchange.__new__(Exchange), [], [])
    with pytest.raises(RuntimeError, match="must begin a backward pass"):
        way.arrive(torch.ones(1))
