"""gaf.attach with Mean and RandomSkip: plain averaging bit for bit, and skips that fall alike."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import attach_model, difference, equal, loss, momentum, net, values
from helpers.problems import Wide, plain_loss
from helpers.ranks import World

pytestmark = pytest.mark.distributed


def compare_mean_with_ddp(dtype: torch.dtype, view: bool) -> None:
    options = {"bucket_cap_mb": 0.002, "gradient_as_bucket_view": view}
    model, optimizer, handle = attach_model(gaf.Mean(), partial(Wide, dtype), **options)
    torch.manual_seed(3)
    plain = DistributedDataParallel(Wide(dtype), **options)
    other = SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad()
            plain_loss(m, step, dist.get_rank()).backward()
            o.step()
    assert equal(model, values(plain))
    stats = handle.stats()
    assert (stats["steps"], stats["stepped"], stats["absent"]) == (4, 4, 0)
    assert handle.last is not None
    assert handle.last.distances.isnan().all()


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_is_plain_ddp_bit_for_bit(world: World, W: int, dtype: torch.dtype) -> None:
    world(W).run(compare_mean_with_ddp, dtype, W == 3)


def skip_at_random() -> list[bool]:
    model, optimizer, handle = attach_model(gaf.RandomSkip(0.5, seed=4))
    went = []
    for step in range(8):
        before = values(model)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
        assert handle.last is not None
        went.append(bool(handle.last.stepped))
        assert equal(model, before) != went[-1]
    return went


def test_random_skips_fall_alike_on_all_ranks(world: World) -> None:
    first, *others = world(3).run(skip_at_random)
    assert set(first) == {True, False}
    assert all(other == first for other in others)


def average_after_a_join(initial: bool) -> None:
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
    world(W).run(average_after_a_join, initial)
