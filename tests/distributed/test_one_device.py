"""W ranks of one micro-batch do what one device does with W micro-batches."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

import gaf
from helpers.attached import attach_model
from helpers.problems import KINDS, Wide, micro_gradients, plain_loss, telling_tau
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def compare_with_accumulator(start: str) -> None:
    W = dist.get_world_size()
    model, optimizer, handle = attach_model(gaf.GAF(0.9, start=start), Wide)
    twin = copy.deepcopy(model.module)
    other = SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    acc = gaf.Accumulator(other, gaf.GAF(0.9, start=start))
    went = []
    for step, kind in enumerate(KINDS):
        tau = telling_tau(micro_gradients(twin, step, W), kind)
        handle.policy = acc.policy = gaf.GAF(tau, start=start)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
        for rank in range(W):
            acc.backward(plain_loss(twin, step, rank))
        decision = acc.step()
        assert handle.last is not None
        assert torch.equal(handle.last.accepted, decision.accepted)
        went.append(bool(decision.stepped))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert True in went
    assert start == "best" or False in went
    mine, theirs = handle.stats(6), acc.stats(6)
    assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("start", ["first", "best"])
@pytest.mark.parametrize("W", [2, 4])
def test_w_ranks_do_what_one_device_does_with_w_micro_batches(
    world: World, W: int, start: str
) -> None:
    world(W).run(compare_with_accumulator, start)


def loss_pulled_to_a_target(model: nn.Module, step: int, rank: int) -> Tensor:
    """A loss whose gradients have something in common."""
    return plain_loss(model, step, rank) + 0.1 * sum(p.sum() for p in model.parameters())


def taus_of_both(kind: str) -> tuple[list[float], list[float], list[float]]:
    """tau of every step: under attach, on one device, and from a state that was saved half-way."""
    W = dist.get_world_size()
    kinds = {
        "SignalTau": gaf.SignalTau,
        "NoiseFloorTau": partial(gaf.NoiseFloorTau, 0.3),
        "QuantileTau": gaf.QuantileTau,
        "MovingAverageTau": partial(gaf.MovingAverageTau, cap=2.0),
    }
    model, optimizer, handle = attach_model(gaf.GAF(kinds[kind]()), Wide)
    twin = copy.deepcopy(model.module)
    acc = gaf.Accumulator(SGD(twin.parameters(), 0.05), gaf.GAF(kinds[kind]()))
    over, alone = [], []
    for step in range(6):
        if step == 3:
            saved = pickle.loads(pickle.dumps(handle.state_dict()))
            handle.detach()
            handle = gaf.attach(model, optimizer, gaf.GAF(kinds[kind]()))
            handle.load_state_dict(saved)
        optimizer.zero_grad()
        loss_pulled_to_a_target(model, step, dist.get_rank()).backward()
        optimizer.step()
        for rank in range(W):
            acc.backward(loss_pulled_to_a_target(twin, step, rank))
        acc.step()
        twin.load_state_dict(model.module.state_dict())  # tau is compared, not how rounding grows
        over.append(handle.stats()["tau"])
        alone.append(acc.stats()["tau"])
    return over, alone, handle.state_dict()["policy"]["tau"]["state"]


@pytest.mark.parametrize("kind", ["SignalTau", "NoiseFloorTau", "QuantileTau", "MovingAverageTau"])
@pytest.mark.parametrize("W", [2, 4])
def test_a_tau_that_adapts_is_the_same_on_all_ranks_and_that_of_one_device(
    world: World, W: int, kind: str
) -> None:
    ranks = world(W).run(taus_of_both, kind)
    over, alone, state = ranks[0]
    assert all(rank == ranks[0] or rank[::2] == ranks[0][::2] for rank in ranks)  # bit for bit
    assert len(set(over)) > 2
    # Rows are added up in other pieces. With two of them NoiseFloorTau takes a variance over steps:
    # a difference of near numbers.
    assert over == pytest.approx(alone, abs=1e-3 if (kind, W) == ("NoiseFloorTau", 2) else 1e-5)
    assert state
