"""The policy, detaching, copying and saving, and what a saved state holds."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, SequentialLR, StepLR
from torch.optim.swa_utils import AveragedModel

import gaf
from helpers.attached import RATE, attach_model, equal, loss, net, values
from helpers.problems import close, flat_grad, micro_gradients, plain_loss, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


# ---------------------------------------------------------------------------- detach, state, groups


def detach_and_attach_again() -> None:
    model, optimizer, handle = attach_model(gaf.GAF(0.0))
    plain_loss(model, 0, dist.get_rank()).backward()
    assert handle.last is not None
    assert not handle.last.stepped
    optimizer.step()
    handle.detach()
    W = dist.get_world_size()
    for policy in (None, gaf.GAF(0.0), None):
        if policy is not None:
            handle = gaf.attach(model, optimizer, policy)
        rows = micro_gradients(model.module, 1, W)
        optimizer.zero_grad()
        plain_loss(model, 1, dist.get_rank()).backward()
        close(flat_grad(model), rows.mean(0) if policy is None else 0 * rows[0], rows)
        before = values(model)
        optimizer.step()
        assert equal(model, before) == (policy is not None)
        handle.detach()


def test_detach_leaves_plain_averaging_and_attaching_again_filters(world: World) -> None:
    world(2).run(detach_and_attach_again)


def save_and_load() -> None:
    model, optimizer, handle = attach_model(gaf.RandomSkip(0.5))
    for step in range(3):
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
    saved = pickle.loads(pickle.dumps(handle.state_dict()))
    handle.detach()
    again = gaf.attach(model, optimizer, gaf.RandomSkip(0.5))
    again.load_state_dict(saved)
    assert again.stats()["steps"] == 3
    assert again.policy.step == 3
    same_everywhere(torch.tensor([float(again.stats()["stepped"])]))


def test_state_is_saved_and_taken_back(world: World) -> None:
    world(2).run(save_and_load)


# --------------------------------------------------------------------------------------- the policy


def exchange_policies() -> None:
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
        (gaf.GAF(min_accepted=3), "needs 3, and there are 2. Lower min_accepted"),
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
    world(2).run(exchange_policies)


# ------------------------------------------------------------------------------- copying and saving


def copy_and_save() -> None:
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
    world(2).run(copy_and_save)


# ----------------------------------------------------------------------------- state, gates, attach


def save_after_an_overflow() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    scaler = GradScaler("cpu", init_scale=2.0)
    tau = gaf.ScheduleTau([(0, 2.0), (10, 1.0)])
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(tau), scaler=scaler)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(wrapped, step) * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    state = handle.state_dict()
    assert state["telemetry"]["totals"]["steps"] == 3
    assert state["policy"]["tau"]["state"] == [3.0]
    for wrong in ({}, None, state | {"rejected": 3}, state | {"policy": {"step": 1}}):
        with pytest.raises(ValueError, match=r"the state must"):
            inspect.unwrap(gaf.Handle.load_state_dict)(handle, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the state of the counts must hold"):
        handle.load_state_dict(state | {"telemetry": {}, "policy": gaf.GAF(tau).state_dict()})
    assert handle.state_dict()["policy"] == state["policy"]  # nothing was taken


def gate_oddly() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    parts = [LinearLR(optimizer, 0.1, 1.0, 3), ExponentialLR(optimizer, 0.9)]
    for one in parts:
        handle.gate(one)
    scheduler = SequentialLR(optimizer, parts, [3])
    rates = []
    for step in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01, 0.04, 0.07, 0.1, 0.09])
    foreign = StepLR(SGD([nn.Parameter(torch.zeros(1))], RATE), 1)
    with pytest.raises(ValueError, match="must drive one of the optimizers"):
        handle.gate(foreign)
    handle.detach()
    with pytest.raises(RuntimeError, match="the handle must be attached.*it was detached"):
        handle.gate(StepLR(optimizer, 1))


def share_between_models() -> None:
    """The optimizer moves the second model while the first skips: its scheduler goes on."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(4, 3)
    optimizer = SGD([*first.parameters(), *second.parameters()], RATE)
    a, b = DistributedDataParallel(first), DistributedDataParallel(second)
    handle = gaf.attach(a, optimizer, gaf.GAF(0.0))
    gaf.attach(b, optimizer, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    for step in range(3):
        optimizer.zero_grad()
        loss(nn.Sequential(a, b), step).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 3


def evaluate_before() -> None:
    """FSDP2 leaves the root whole after a forward pass without gradients."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    with torch.no_grad():
        model(torch.ones(2, 6))
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"])
    loss(model, 0).backward()
    optimizer.step()
    assert handle.stats()["stepped"] == 1


def refuse_without_a_trace() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    with torch.no_grad():
        next(model.parameters()).to_local().add_(dist.get_rank())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must start from the same weights"):
        gaf.attach(model, optimizer, gaf.GAF(), group=mesh["replicate"])
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "task",
    [
        save_after_an_overflow,
        gate_oddly,
        share_between_models,
        evaluate_before,
        refuse_without_a_trace,
    ],
)
def test_state_gates_and_attach(world: World, task: Callable[[], None]) -> None:
    world(2).run(task)
