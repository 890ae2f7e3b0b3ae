"""gaf.attach in the loops that people write: whose step a decision is, what is noticed, and what is left alone."""

import copy
import inspect
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

import gaf
from helpers.problems import (
    close,
    flat_grad,
    micro_gradients,
    same_everywhere,
)

pytestmark = pytest.mark.distributed
World = Callable[[int], Any]
RATE = 0.1
unchecked = inspect.unwrap(gaf.attach)  # without the tests' own check of its annotations


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def loss(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    rank = dist.get_rank() if rank is None else rank
    rng = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(5, 6, generator=rng), torch.randn(5, 3, generator=rng)
    return (model(x) - y).pow(2).mean()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


def momentum(model: nn.Module) -> SGD:
    """An optimizer that moves on zero gradients too: a skip must be more than those."""
    return SGD(model.parameters(), RATE, momentum=0.9, weight_decay=0.1)


def trained_plainly(steps: range) -> list[Tensor]:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    for step in steps:
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
    return values(model)


# -------------------------------------------------------------------------------------------- a skip belongs to one step


def rewrapped(deleted: bool) -> None:
    model = net(6, 8, 3)
    optimizer = momentum(model)
    first = DistributedDataParallel(model)
    old = gaf.attach(first, optimizer, gaf.GAF(0.0))
    loss(first, 0).backward()
    optimizer.step()
    assert old.last is not None
    assert not old.last.stepped
    second = DistributedDataParallel(model)
    if not deleted:
        with pytest.raises(RuntimeError, match=r"must not be attached already.*Call detach\(\)"):
            gaf.attach(second, optimizer, gaf.GAF(2.0))
        old.detach()
    del first
    handle = gaf.attach(second, optimizer, gaf.GAF(2.0))
    assert not old.attached
    for step in range(1, 4):
        optimizer.zero_grad()
        loss(second, step).backward()
        optimizer.step()
    assert handle.stats()["stepped"] == 3
    assert difference(values(model), trained_plainly(range(1, 4))) < 1e-6


@pytest.mark.parametrize("deleted", [True, False])
def test_a_model_that_is_wrapped_again_moves_as_its_new_handle_says(
    world: World, deleted: bool
) -> None:
    world(2).run(rewrapped, deleted)


def reduced_by_hand(overflow: bool) -> None:
    """The step after a skip is the user's own: its gradients came under no_sync, and were averaged by hand."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    scaler = GradScaler("cpu", init_scale=2.0) if overflow else None
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0), scaler=scaler)
    if scaler is None:
        loss(wrapped, 0).backward()
        optimizer.step()
    else:  # a GradScaler does not call the optimizer: the skip waits
        scaler.scale(loss(wrapped, 0) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert handle.last is not None
    assert not handle.last.stepped
    before = values(model)
    optimizer.zero_grad()
    with wrapped.no_sync():
        loss(wrapped, 1).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    expected = [p - RATE * p.grad for p in model.parameters()]
    optimizer.step()
    assert difference(values(model), expected) < 1e-6
    assert difference(values(model), before) > 0.01


@pytest.mark.parametrize("overflow", [False, True])
def test_a_skip_does_not_reach_a_later_step_of_the_users_own(world: World, overflow: bool) -> None:
    world(2).run(reduced_by_hand, overflow)


def two_models() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 3)
    optimizer = SGD([*encoder.parameters(), *decoder.parameters()], RATE, momentum=0.9)
    first, second = DistributedDataParallel(encoder), DistributedDataParallel(decoder)
    one = gaf.attach(first, optimizer, gaf.GAF(0.0))
    two = gaf.attach(second, optimizer, gaf.GAF(2.0))
    for step in range(3):
        optimizer.zero_grad()
        before = values(encoder), values(decoder)
        loss(nn.Sequential(first, second), step).backward()
        assert one.last is not None
        assert two.last is not None
        assert not one.last.stepped
        assert two.last.stepped
        optimizer.step()
        assert difference(values(encoder), before[0]) == 0
        assert difference(values(decoder), before[1]) > 1e-4
    assert (one.stats()["steps"], one.stats()["stepped"]) == (3, 0)
    assert (two.stats()["steps"], two.stats()["stepped"]) == (3, 3)


def test_a_handle_acts_on_its_own_parameters_only(world: World) -> None:
    world(2).run(two_models)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.heads[which](torch.tanh(self.body(x)))


def head_loss(model: nn.Module, which: int, step: int) -> Tensor:
    return loss(lambda x: model(x, which), step)  # type: ignore[arg-type]


def head_rows(model: Heads, which: int, step: int) -> Tensor:
    """(W, n): each rank's gradient of one head, zeros elsewhere."""
    return micro_gradients(
        model, step, 2, lambda twin, step, rank: loss(lambda x: twin(x, which), step, rank)
    )


def shared_step(hybrid: bool, view: bool, scope: str) -> None:
    """Two synchronised passes over different heads, then one step: each head has its own decision, on its own gradient."""
    torch.manual_seed(0)
    model, twin = Heads(), Heads()
    model.body.requires_grad_(False)
    twin.body.requires_grad_(False)
    options: dict[str, Any] = {}
    if hybrid:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        options = {"group": mesh["replicate"]}
        for head in model.heads:
            fully_shard(head, mesh=mesh["shard"])
        wrapped = fully_shard(model, mesh=mesh["shard"])
    else:
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=view
        )
    optimizer = SGD(model.heads.parameters(), RATE, momentum=0.9, weight_decay=0.1)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope), **options)
    for step, taus in enumerate(((2.0, 2.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0))):
        optimizer.zero_grad()
        before = [whole_values(head) for head in model.heads]
        with torch.no_grad():
            for p, value in zip(twin.parameters(), whole_values(model), strict=True):
                p.copy_(value)
        for which, tau in enumerate(taus):
            handle.policy = gaf.GAF(tau, scope=scope)
            head_loss(wrapped, which, step).backward()
            right = gaf.aggregate(head_rows(twin, which, step), gaf.GAF(tau))[1]
            assert handle.last is not None
            if scope == "all":
                torch.testing.assert_close(
                    handle.last.distances, right.distances, rtol=0, atol=1e-6
                )
        optimizer.step()
        for head, old, tau in zip(model.heads, before, taus, strict=True):
            assert (difference(whole_values(head), old) == 0) == (tau == 0.0)
    if scope == "all":
        assert (handle.stats()["steps"], handle.stats()["stepped"]) == (8, 6)
    handle.detach()


def whole_values(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in values(model)]


@pytest.mark.parametrize(
    ("hybrid", "view", "scope"),
    [(False, False, "all"), (False, True, "all"), (True, False, "all"), (False, True, "group")],
)
def test_passes_over_different_parameters_may_share_a_step(
    world: World, hybrid: bool, view: bool, scope: str
) -> None:
    world(2).run(shared_step, hybrid, view, scope)


def detached_in_between() -> None:
    """After the decision and before the step: the skip holds all the same."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    loss(wrapped, 0).backward()
    optimizer.step()  # there is momentum now
    optimizer.zero_grad()
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    loss(wrapped, 1).backward()
    before = values(model)
    handle.detach()
    optimizer.step()
    assert difference(values(model), before) == 0


def test_detaching_leaves_a_skip_in_place(world: World) -> None:
    world(2).run(detached_in_between)


def twice() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    hybrid = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    flat = fully_shard(net(6, 8, 3), mesh=init_device_mesh("cpu", (4,)))
    plain = DistributedDataParallel(net(6, 8, 3))
    for model, scope, options in (
        (hybrid, "all", {"group": group}),
        (flat, "group", {}),
        (plain, "all", {}),
    ):
        optimizer = SGD(model.parameters(), RATE)
        first = gaf.attach(model, optimizer, gaf.GAF(0.0, scope=scope), **options)
        with pytest.raises(RuntimeError, match="must not be attached already"):
            gaf.attach(model, optimizer, gaf.GAF(0.0, scope=scope), **options)
        loss(model, 0).backward()
        assert first.last is not None
        assert first.last.distances[1] > 0.05
        optimizer.step()
        first.detach()
        optimizer.zero_grad()
        second = gaf.attach(model, optimizer, gaf.GAF(2.0, scope=scope), **options)
        loss(model, 0).backward()
        assert second.last is not None
        assert second.last.distances[1] > 0.05
        optimizer.step()
        assert second.stats()["stepped"] == second.stats()["steps"] >= 1


def test_a_model_is_attached_once_at_a_time(world: World) -> None:
    world(4).run(twice)


# ------------------------------------------------------------------------------------------------- frozen and thawed layers


def deep() -> nn.Sequential:
    return net(6, 8, 8, 3)


def frozen_after_wrapping(late: bool) -> None:
    """Buckets smaller than the layers, some of which hold nothing but what is frozen."""
    ends = []
    for filtered in (False, True):
        model = deep()
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6, find_unused_parameters=True)
        if not late:
            model[0].requires_grad_(False)
        optimizer = momentum(model)
        handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0)) if filtered else None
        for step in range(4):
            model[0].requires_grad_(step in (2,) if not late else step not in (1, 2))
            optimizer.zero_grad()
            loss(wrapped, step).backward()
            optimizer.step()
        if handle is not None:
            assert (handle.stats()["steps"], handle.stats()["stepped"]) == (4, 4)
        ends.append(values(model))
    assert difference(*ends) < 1e-6


@pytest.mark.parametrize("late", [False, True])
def test_layers_may_be_frozen_and_thawed_again(world: World, late: bool) -> None:
    world(2).run(frozen_after_wrapping, late)


def thawed(late: bool) -> None:
    model = deep()
    model[0].requires_grad_(False)
    wrapped, optimizer = DistributedDataParallel(model), momentum(model)
    if not late:
        model[0].requires_grad_(True)
        with pytest.raises(ValueError, match=r"'0.weight' was frozen then. Wrap the model again"):
            gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
        return
    gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    model[0].requires_grad_(True)
    loss(wrapped, 0).backward()
    before = values(model)
    with pytest.raises(ValueError, match=r"'0.weight' was frozen then. Wrap the model again"):
        optimizer.step()
    assert difference(values(model), before) == 0


@pytest.mark.parametrize("late", [False, True])
def test_layers_thawed_after_wrapping_are_refused_by_name(world: World, late: bool) -> None:
    world(2).run(thawed, late)


def ignored() -> None:
    """What DDP is told to ignore is the user's own, also on a skip."""
    model = net(6, 8, 3)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.bias"])
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    before = values(model)
    loss(wrapped, 0).backward()
    expected = before[3] - RATE * model[2].bias.grad
    optimizer.step()
    assert difference(values(model)[:3], before[:3]) == 0
    assert torch.equal(model[2].bias, expected)


def test_parameters_that_ddp_ignores_are_left_alone(world: World) -> None:
    world(2).run(ignored)


def sharded_and_thawed() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = net(6, 8, 3)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    model[0].requires_grad_(False)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"].get_group())
    for step, (first, second) in enumerate(((False, True), (True, True), (True, False))):
        model[0].requires_grad_(first)
        model[2].requires_grad_(second)
        twin = net(6, 8, 3)
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q.full_tensor())  # type: ignore[attr-defined]
        rows = micro_gradients(twin, step, 2, loss)
        keep = torch.cat(
            [
                torch.full((p.numel(),), q.requires_grad)
                for p, q in zip(twin.parameters(), model.parameters(), strict=True)
            ]
        )
        _, right = gaf.aggregate(rows * keep, gaf.GAF(2.0))
        optimizer.zero_grad()
        loss(model, step).backward()
        assert handle.last is not None
        torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
        optimizer.step()
    same_everywhere(*(p.to_local() for p in model.parameters()))  # type: ignore[attr-defined]
    handle.detach()


def test_sharded_layers_may_be_thawed_after_attach(world: World) -> None:
    world(2).run(sharded_and_thawed)


# ----------------------------------------------------------------------------------------------------------- stale gradients


def weighed_by_gradient_norms() -> None:
    """torch.autograd.grad between the forward pass and zero_grad(), as VQGAN and GradNorm weigh their losses."""
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
    world(2).run(weighed_by_gradient_norms)


def saliency() -> None:
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
    world(2).run(saliency)


def uncleared_body() -> None:
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
    ranks.run(uncleared_body)
    ranks.broken = True  # DDP's own state is that of a pass that an exception ended


def cleared_with_zeros() -> None:
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
    assert difference(values(model), trained_plainly(range(4))) < 1e-6


def test_gradients_filled_with_zeros_are_cleared(world: World) -> None:
    world(2).run(cleared_with_zeros)


def broken_off() -> None:
    """A pass onto an update that an exception ends leaves nothing behind once the gradients are cleared."""
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
    world(2).run(broken_off)


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def judge(self, x: Tensor) -> Tensor:
        return self.inner(x)


def other_forward_method() -> None:
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
    world(2).run(other_forward_method)


# ------------------------------------------------------------------------------------------------- two models that take turns


def adversarial(clears: bool, policy: Any) -> tuple[list[Tensor], Any, Any, Any]:
    """A GAN's loop. clears: whether the generator's step clears the discriminator's gradients first."""
    torch.manual_seed(0)
    generator, critic = DistributedDataParallel(net(4, 4)), DistributedDataParallel(net(4, 3, 1))
    of_g, of_c = (SGD(m.parameters(), RATE, momentum=0.9) for m in (generator, critic))
    first = second = scheduler = None
    scheduler = StepLR(of_c, 1, 0.9)
    if policy is not None:
        first, second = gaf.attach(generator, of_g, policy()), gaf.attach(critic, of_c, policy())
        second.gate(scheduler)
    rng = torch.Generator().manual_seed(dist.get_rank())
    judge = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)
    for _ in range(6):
        z, x = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
        of_c.zero_grad()
        both = torch.cat([x, generator(z).detach()])
        judge(critic(both), torch.cat([real, fake])).backward()
        of_c.step()
        scheduler.step()
        if clears:
            of_c.zero_grad()
        of_g.zero_grad()
        judge(critic(generator(z)), real).backward()
        of_g.step()
    return [*values(generator), *values(critic)], first, second, scheduler


def taking_turns(clears: bool) -> None:
    plain, *_ = adversarial(clears, None)
    filtered, first, second, scheduler = adversarial(clears, lambda: gaf.GAF(2.0))
    assert difference(plain, filtered) < 1e-6
    assert scheduler.last_epoch == 6
    for handle in (first, second):
        assert (handle.stats()["steps"], handle.stats()["stepped"]) == (6, 6)
        assert handle.stats()["micro_gradients"] == 12


@pytest.mark.parametrize("clears", [True, False])
def test_a_handle_counts_its_own_models_steps_only(world: World, clears: bool) -> None:
    world(2).run(taking_turns, clears)


def learning_in_turns() -> None:
    """A policy learns from the steps that are taken on its decisions: the draws of RandomSkip go on by one for each."""
    _, first, second, scheduler = adversarial(True, lambda: gaf.RandomSkip(0.5, seed=1))
    expected = [any(gaf.RandomSkip(0.5, seed=1).planned(step, 2)) for step in range(6)]
    for handle in (first, second):
        assert handle.state_dict()["policy"] == {"step": 6}
    assert second.stats()["stepped"] == scheduler.last_epoch == sum(expected)
    assert first.stats()["stepped"] == sum(expected)


def test_a_policy_learns_from_its_own_models_steps_only(world: World) -> None:
    world(2).run(learning_in_turns)


# ------------------------------------------------------------------------------------------------------------ gated schedulers


def overflowing(name: str, fused: bool) -> None:
    model = deep()
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), 0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0)
    handle = gaf.attach(wrapped, optimizer, POLICIES[name](), scaler=scaler)
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    epochs = []
    for step in range(5):
        optimizer.zero_grad()
        value = loss(wrapped, step)
        if step in (1, 3):
            value = value + float("inf") * model[4].bias.sum()  # of the first bucket alone
        before = values(model)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert (difference(values(model), before) == 0) == (step in (1, 3))
        epochs.append(scheduler.last_epoch)
    assert epochs == [1, 1, 2, 2, 3]
    steps, stepped = handle.stats()["steps"], handle.stats()["stepped"]
    groups = steps // 5 if name == "group" else 1
    assert stepped == 3 * groups
    if name != "Mean" or fused:  # a plain average does not show that it overflowed
        assert steps == 5 * groups


POLICIES: dict[str, Callable[[], Any]] = {
    "Mean": gaf.Mean,
    "group": lambda: gaf.GAF(2.0, scope="group"),
    "GAF": lambda: gaf.GAF(2.0),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_a_gated_scheduler_stands_still_at_an_overflow(
    world: World, name: str, fused: bool
) -> None:
    world(2).run(overflowing, name, fused)


def gates() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    scheduler = StepLR(optimizer, 1, 0.9)

    def steps(count: int) -> int:
        for step in range(count):
            optimizer.zero_grad()
            loss(wrapped, step).backward()
            optimizer.step()
            scheduler.step()
        return scheduler.last_epoch

    first = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    first.gate(scheduler)
    assert steps(2) == 0
    first.detach()
    assert steps(2) == 2  # free
    second = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    assert steps(2) == 4
    second.gate(scheduler)
    assert steps(2) == 4
    first.detach()  # again: nothing is left of it
    second.policy = gaf.GAF(2.0)
    assert steps(2) == 6


def test_a_scheduler_is_free_after_detach_and_gated_again_by_a_new_handle(world: World) -> None:
    world(2).run(gates)


def in_turns() -> None:
    """Two optimizers of one model that step in turns, each with a scheduler of its own."""
    torch.manual_seed(0)
    model = Heads()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizers = [SGD(part.parameters(), RATE) for part in (model.body, model.heads)]
    handle = gaf.attach(wrapped, optimizers, gaf.GAF(2.0))
    schedulers = [handle.gate(StepLR(one, 1, 0.9)) for one in optimizers]
    for step in range(6):
        model.zero_grad()
        head_loss(wrapped, 0, step).backward()
        optimizers[step % 2].step()
        schedulers[step % 2].step()
    assert [one.last_epoch for one in schedulers] == [3, 3]
    other = StepLR(SGD([nn.Parameter(torch.zeros(1))], RATE), 1)
    with pytest.raises(
        ValueError, match="must drive one of the optimizers that were given to attach"
    ):
        handle.gate(other)


def test_a_gated_scheduler_follows_its_own_optimizer(world: World) -> None:
    world(2).run(in_turns)


def failing_step() -> None:
    """An optimizer whose step fails has taken none."""
    model = net(6, 8, 3)

    class Failing(SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise OSError("no")
            return super().step(closure)

    wrapped, optimizer = DistributedDataParallel(model), Failing(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step in range(3):
        optimizer.fails = step == 1
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        if optimizer.fails:
            with pytest.raises(OSError, match="no"):
                optimizer.step()
        else:
            optimizer.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"]) == (2, 2)


def test_a_step_that_fails_is_not_counted(world: World) -> None:
    world(2).run(failing_step)


# ------------------------------------------------------------------------------------------------------------- the policy


def another_policy() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    shared = gaf.GAF(gaf.MovingAverageTau())
    handle.policy = shared
    untouched = copy.deepcopy(shared.state_dict())
    for step in range(3):
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
    assert shared.state_dict() == untouched  # the handle has a copy of its own
    assert handle.policy.state_dict() != untouched
    for policy, message in (
        (gaf.GAF, "handle.policy: policy must be a callable"),
        (gaf.GAF(scope="layer"), "must be 'all' or 'group'; got 'layer'"),
        (gaf.GAF(min_accepted=3), "must be at most the number of rows.*got 3 and 2 rows"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            handle.policy = policy
    assert isinstance(handle.policy.tau, gaf.MovingAverageTau)
    mesh = init_device_mesh("cpu", (2,))
    flat = fully_shard(net(6, 8, 3), mesh=mesh)
    other = gaf.attach(flat, SGD(flat.parameters(), RATE), gaf.GAF(2.0, scope="group"))
    with pytest.raises(ValueError, match="must keep the scope 'group'.*got 'all'"):
        other.policy = gaf.Mean()


def test_a_policy_that_is_put_in_later_is_checked_and_copied(world: World) -> None:
    world(2).run(another_policy)


def joined(initial: bool) -> None:
    ends = []
    for filtered in (False, True):
        model = net(6, 8, 3)
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6)
        optimizer = momentum(model)
        if filtered:
            gaf.attach(wrapped, optimizer, gaf.Mean())
        with wrapped.join(divide_by_initial_world_size=initial):
            for step in range(2 + dist.get_rank()):
                optimizer.zero_grad()
                loss(wrapped, step).backward()
                optimizer.step()
        ends.append(values(model))
    assert difference(*ends) == 0


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("W", [2, 3])
def test_mean_is_plain_ddp_bit_for_bit_where_ranks_have_joined(
    world: World, W: int, initial: bool
) -> None:
    world(W).run(joined, initial)


# ------------------------------------------------------------------------------------------------------ copying and saving


def copied_and_saved() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    loss(wrapped, 0).backward()
    optimizer.step()
    average = AveragedModel(wrapped)
    average.update_parameters(wrapped)
    saved = io.BytesIO()
    torch.save(wrapped, saved)
    assert b"gaf" not in saved.getvalue()  # whoever loads it needs torch alone
    saved.seek(0)
    for twin in (copy.deepcopy(wrapped), torch.load(saved, weights_only=False)):
        rows = micro_gradients(twin.module, 1, 2, loss)
        twin.zero_grad()
        loss(twin, 1).backward()
        close(flat_grad(twin), rows.mean(0), rows)  # not attached: plain averaging
        again = gaf.attach(twin, SGD(twin.parameters(), RATE), gaf.GAF(0.0))
        twin.zero_grad()
        loss(twin, 1).backward()
        assert flat_grad(twin).abs().max() == 0
        again.detach()
    optimizer.zero_grad()
    loss(wrapped, 1).backward()
    assert handle.last is not None
    assert flat_grad(wrapped).abs().max() == 0  # the original is


def test_a_model_is_copied_and_saved_as_before_attach(world: World) -> None:
    world(2).run(copied_and_saved)


# ----------------------------------------------------------------------------------------------------- coordinates spread out


class Halves(nn.Module):
    """Two layers by hand over two ranks: the first by its columns, the second by its rows (Megatron's way)."""

    def __init__(self, group: Any, half: int) -> None:
        super().__init__()
        whole = net(6, 8, 3)
        rows = slice(4 * half, 4 * half + 4)
        self.group = group
        self.a = nn.Parameter(whole[0].weight.detach()[rows].clone())
        self.bias = nn.Parameter(whole[0].bias.detach()[rows].clone())
        self.b = nn.Parameter(whole[2].weight.detach()[:, rows].clone())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.a.T + self.bias) @ self.b.T
        return AddUp.apply(h, self.group)


class AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def spread_out(together: bool) -> tuple[bool, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = mesh["data"], mesh["tensor"]
    model = Halves(tensor.get_group(), tensor.get_local_rank())
    wrapped = DistributedDataParallel(model, process_group=data.get_group())
    optimizer = SGD(model.parameters(), RATE)
    whole = net(6, 8, 3)
    whole[2].bias = None  # type: ignore[assignment]
    rows = micro_gradients(whole, 0, 2, loss)
    _, right = gaf.aggregate(rows, gaf.GAF(2.0))
    tau = right.distances[1].item()
    options = {"shards": tensor} if together else {}
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(tau + 1e-3), **options)
    loss(wrapped, 0, data.get_local_rank()).backward()
    assert handle.last is not None
    if together:
        torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
        same_everywhere(handle.last.distances)
    handle.detach()
    return bool(handle.last.stepped), handle.last.distances[1].item()


def test_shards_decide_alike_where_their_gram_matrices_are_added_up(world: World) -> None:
    assert {stepped for stepped, _ in world(4).run(spread_out, True)} == {True}
    alone = world(4).run(spread_out, False)
    assert len({stepped for stepped, _ in alone}) == 2  # each half for itself: one steps, one skips


def wrong_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = net(6, 8, 3)
    wrapped = DistributedDataParallel(model, process_group=mesh["data"].get_group())
    optimizer = SGD(model.parameters(), RATE)
    for options, message in (
        ({"shards": mesh["data"]}, "must have this rank alone in common"),
        ({"shards": mesh}, "a mesh of one dimension"),
        ({"shards": "tensor"}, "shards must be a torch.distributed.ProcessGroup; got 'tensor'"),
        ({"shards": mesh["tensor"], "policy": gaf.GAF(scope="group")}, "scope must be 'all'"),
        ({"group": mesh}, "group must be a process group, or a mesh of one dimension"),
        ({"group": [0, 1]}, r"group must be a torch.distributed.ProcessGroup; got \[0, 1\]"),
        ({"scaler": 2.0}, "scaler must be a torch.amp.GradScaler or None; got float"),
        ({"micro_group": 1.0}, "micro_group must be a whole number"),
        ({"micro_group": True}, "micro_group must be a whole number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            unchecked(wrapped, optimizer, **({"policy": gaf.GAF()} | options))


def test_wrong_arguments_are_named(world: World) -> None:
    world(4).run(wrong_shards)


def meshes_and_numpy() -> None:
    import numpy as np

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    handle = unchecked(
        model,
        SGD(model.parameters(), RATE),
        gaf.GAF(2.0),
        group=mesh["replicate"],
        micro_group=np.int64(1),
    )
    loss(model, 0).backward()
    assert handle.last is not None
    assert len(handle.last.weights) == 2
    other = net(6, 8, 3)
    fully_shard(other, mesh=mesh["shard"], ignored_params=set(other[2].parameters()))
    with pytest.raises(ValueError, match=r"'2.weight' is not \(ignored_params\)"):
        gaf.attach(other, SGD(other.parameters(), RATE), gaf.GAF(), group=mesh["replicate"])
    other[2].requires_grad_(False)
    frozen = SGD(other[0].parameters(), RATE)
    handle = gaf.attach(other, frozen, gaf.GAF(2.0), group=mesh["replicate"])
    loss(other, 0).backward()
    frozen.step()
    assert handle.stats()["stepped"] == 1


def test_a_mesh_is_a_group_and_numpys_integers_are_integers(world: World) -> None:
    world(2).run(meshes_and_numpy)


def elsewhere_by_default(scope: str) -> list[float]:
    model = net(6, 8, 3)
    wrapped = DistributedDataParallel(model)
    found = []
    torch.set_default_device("meta")
    try:
        optimizer = momentum(model)
        handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope))
        for step, policy in enumerate(
            (gaf.GAF(2.0, scope=scope), gaf.Mean(), gaf.GAF(1.9, start="best"))
        ):
            handle.policy = policy
            optimizer.zero_grad()
            with torch.device("cpu"):
                value = loss(wrapped, step)
            value.backward()
            optimizer.step()
            assert handle.last is not None
            found.append(handle.last.weights.sum().item())
    finally:
        torch.set_default_device("cpu")
    return found


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("scope", ["all", "group"])
def test_another_default_device_changes_nothing(world: World, W: int, scope: str) -> None:
    for sums in world(W).run(elsewhere_by_default, scope):
        assert sums == pytest.approx([1.0, 1.0, 1.0])
