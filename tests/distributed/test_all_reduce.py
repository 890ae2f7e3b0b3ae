"""gaf.all_reduce on tensors of any kind, against gaf.aggregate on the stacked rows in float64."""

import datetime
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gaf
from gaf.ranks.all_reduce import check_device
from gaf.ranks.messages import device_of
from helpers.problems import close, same_everywhere
from helpers.ranks import World
from typechecker import without_type_checks

pytestmark = pytest.mark.distributed
LARGE = 70_001  # long enough to be cut into slices, with a remainder


def tensors_of(rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of several kinds: cut, joined, transposed, channels_last, a leaf, a number, empty."""
    rng = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> Tensor:
        common = torch.randn(*shape, generator=torch.Generator().manual_seed(99))
        return (common + torch.randn(*shape, generator=rng)).to(dtype)

    return [
        draw(LARGE),
        draw(30, 7).T,
        nn.Parameter(draw(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        draw(1)[0],
        draw(0),
        draw(11).double(),
        draw(200, 200)[:, ::2],
    ]


def flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def check(policy: Any, dtype: torch.dtype = torch.float32, bad: int = -1, **options: Any) -> bool:
    """bad: a rank whose tensors hold a NaN."""
    group, m = options.get("group"), options.get("micro_group", 1)
    members = dist.get_process_group_ranks(group)
    given = {rank: tensors_of(rank, dtype) for rank in members}
    if bad in given:
        given[bad][1].T[0, 3] = math.nan
    rows = torch.stack([flatten(tensors) for tensors in given.values()])
    mine = given[dist.get_rank()]
    strides = [t.stride() for t in mine]
    rows = rows.view(len(rows) // m, m, -1).mean(1)
    update, expected = gaf.aggregate(rows, policy)
    decision = gaf.all_reduce(mine, policy, **options)
    assert decision.accepted.tolist() == expected.accepted.tolist()
    assert bool(decision.stepped) == bool(expected.stepped)
    sound = rows[rows.norm(dim=1).isfinite()]
    close(flatten(mine), update, sound, 1e-6 if dtype == torch.float32 else 1e-2)
    if not decision.stepped:
        assert not flatten(mine).any()
    assert [t.stride() for t in mine] == strides
    if group is None:
        same_everywhere(decision.weights, *mine)
    return bool(decision.stepped)


def norm_weights(gram: Tensor) -> Tensor:
    return 1 / gram.diagonal().sqrt() / len(gram)


def check_policies() -> None:
    W = dist.get_world_size()
    for policy in (gaf.GAF(2.0), gaf.GAF(2.0, start="best"), gaf.Median(), gaf.SignAgreement(W)):
        assert check(policy)
        assert check(policy, torch.bfloat16)
    assert check(gaf.Mean())
    assert check(norm_weights)
    assert not check(gaf.GAF(0.0))
    for policy in (gaf.GAF(2.0, min_accepted=1), gaf.Median()):
        assert check(policy, bad=1)
    if W == 4:
        assert check(gaf.GAF(2.0), micro_group=2)
        halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        assert check(gaf.GAF(2.0), group=halves[dist.get_rank() % 2])


@pytest.mark.parametrize("W", [2, 3, 4])
def test_tensors_are_replaced_by_the_update(world: World, W: int) -> None:
    world(W).run(check_policies)


def reduce_alone() -> None:
    mine = tensors_of(0)
    for policy in (gaf.GAF(0.0), gaf.Median(), gaf.Mean(), gaf.TrimmedMean(1)):
        before = flatten(mine)
        assert gaf.all_reduce(mine, policy).stepped
        close(flatten(mine), before, before[None])
    mine[0][0] = math.nan
    assert not gaf.all_reduce(mine, gaf.Median()).stepped
    assert not flatten(mine).any()


def test_a_single_rank_keeps_its_tensors(world: World) -> None:
    world(1).run(reduce_alone)


def learn() -> None:
    """A policy learns from call to call."""
    policy = gaf.RandomSkip(0.5, seed=3)
    alone = gaf.RandomSkip(0.5, seed=3)
    for _ in range(5):
        found = gaf.all_reduce([torch.ones(3)], policy)
        assert bool(found.stepped) == bool(alone(torch.ones(2, 2).double()).stepped)
    assert policy.step == 5


def refuse() -> None:
    """Every rank raises, and the next call works."""
    odd = dist.get_rank() == 1
    given: list[tuple[Any, Any, Any, str]] = [
        ([torch.ones(2 + odd)], gaf.GAF(), 1, r"same tensors; rank . of the group has tensor 0 \("),
        ([torch.ones(2, dtype=torch.float64 if odd else torch.float32)], gaf.GAF(), 1, "tensors"),
        ([torch.ones(2)] * (1 + odd), gaf.GAF(), 1, "same tensors; .* others"),
        ([torch.ones(2)], gaf.GAF(0.5 + odd), 1, "same policy"),
        ([torch.ones(2)], gaf.GAF(), 1 + odd, "same micro_group"),
        ([torch.ones(2)], gaf.GAF() if odd else 0.9, 1, "policy must be a callable"),
        ([torch.ones(2).to(torch.int64 if odd else torch.float32)], gaf.GAF(), 1, "floating"),
        ([torch.ones(2)] * (1 - odd), gaf.GAF(), 1, "at least one tensor"),
        ([torch.ones(2)], gaf.GAF(), 3, "must be a whole number that divides the 2 ranks"),
    ]
    for tensors, policy, micro_group, message in given:
        with pytest.raises(
            (TypeError, ValueError, RuntimeError), match=f"^all_reduce: .*{message}"
        ):
            gaf.all_reduce(tensors, policy, micro_group=micro_group)
    check(gaf.GAF(2.0))


def refuse_unchecked() -> None:
    with without_type_checks():
        refuse()
    learn()


def test_what_cannot_work_is_refused_on_all_ranks(world: World) -> None:
    world(2).run(refuse_unchecked)


@pytest.mark.parametrize(
    ("sends_from", "own", "expected"),
    [
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda", None, "cuda"),  # of a rank whose tensors are refused
        ("cuda", "cpu", "cuda"),
        ("cpu cuda", "cuda:1", "cpu"),
        ("cpu cuda", None, "cpu"),
        ("", "cuda:1", "cuda:1"),
        ("", None, "cpu"),
    ],
)
def test_all_ranks_check_on_the_same_kind_of_device(
    sends_from: str, own: str | None, expected: str
) -> None:
    """Under NCCL a rank with nothing to send must not check on its CPU."""
    group: Any = SimpleNamespace(_device_types=[torch.device(one) for one in sends_from.split()])
    with without_type_checks():
        assert device_of(group, None if own is None else torch.device(own)) == torch.device(
            expected
        )


def test_a_device_that_the_group_does_not_send_from_is_refused() -> None:
    group: Any = SimpleNamespace(_device_types=[torch.device("cuda")])
    with (
        without_type_checks(),
        pytest.raises(ValueError, match="must be on .* sends from, cuda; they are on cpu"),
    ):
        check_device(torch.device("cpu"), group)


def test_without_processes_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        gaf.all_reduce([torch.ones(2)], gaf.GAF())


def reduce_in_a_group_of_another_library() -> None:
    """As torchft makes them, of replicas that come and go: torch.distributed does not know it."""
    store = dist.PrefixStore("replicas", dist.distributed_c10d._get_default_store())
    rank, W = dist.get_rank(), dist.get_world_size()
    group = dist.ProcessGroup(store, rank, W)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    backend = dist.ProcessGroupGloo(store, rank, W, datetime.timedelta(seconds=60))
    backend._set_sequence_number_for_group()
    kind = dist.ProcessGroup.BackendType.GLOO
    group._register_backend(torch.device("cpu"), kind, backend)
    for policy in (gaf.GAF(2.0), gaf.Median()):
        rows = torch.stack([flatten(tensors_of(r)) for r in range(W)])
        mine = tensors_of(rank)
        assert gaf.all_reduce(mine, policy, group=group).stepped
        close(flatten(mine), gaf.aggregate(rows, policy)[0], rows)
        same_everywhere(*mine)


def test_a_group_of_another_library(world: World) -> None:
    world(3).run(reduce_in_a_group_of_another_library)
