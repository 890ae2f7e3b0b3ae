"""What a step sends, in pieces of any size; two ranks' shorter way; a decision for each bucket."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from gaf.ranks import messages
from gaf.ranks.exchange import Exchange
from gaf.ranks.messages import add_in_rank_order
from helpers.attached import Vector, attach_model, values
from helpers.problems import Wide, close, flat_grad, micro_gradients, plain_loss, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


# ------------------------------------------------------------------------------------ what it costs


def coordinates_sent(micro_group: int, policy: Any) -> dict[str, float]:
    """Coordinates that this rank hands to the collectives in one step, counted at each call."""
    model, _, _ = attach_model(gaf.GAF(2.0), Wide, bucket_cap_mb=0.05)
    hook = model._comm_hooks[0][0].__self__
    hook.handle.detach()
    handle = gaf.attach(model, SGD(model.parameters(), 0.1), policy, micro_group=micro_group)
    W = dist.get_world_size()
    plain_loss(model, 0, dist.get_rank()).backward()  # buckets are built anew after the first
    model.zero_grad()
    sent = {"gradient": 0.0, "scalars": 0.0}

    def count(tensor: Tensor, share: float) -> None:
        sent["scalars" if tensor.dtype == torch.float64 else "gradient"] += tensor.numel() * share

    def counted(name: str, share: float) -> Callable[..., Any]:
        real = getattr(messages if name == "_all_gather" else dist, name)

        def call(*tensors: Tensor, **options: Any) -> Any:
            count(tensors[-1], share)
            return real(*tensors, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted("all_reduce", 2 * (W - 1) / W))
        patch.setattr(dist, "all_to_all_single", counted("all_to_all_single", (W - 1) / W))
        patch.setattr(dist, "isend", counted("isend", 1))
        patch.setattr(messages, "_all_gather", counted("_all_gather", W - 1))
        plain_loss(model, 1, dist.get_rank()).backward()
    n = sum(p.numel() for p in model.parameters())
    held = sum(t.numel() for t in hook.way.exchange._spare.flats)  # the pair keeps p.grad instead
    handle.detach()
    return {
        "gradient": sent["gradient"] / (2 * n * (W - 1) / W),
        "scalars": sent["scalars"],
        "held": held / n,
    }


@pytest.mark.parametrize(
    ("W", "micro_group", "policy"),
    [
        *((W, m, gaf.GAF(2.0)) for W, m in ((2, 1), (3, 1), (4, 1), (4, 2))),
        (4, 1, gaf.Median()),
    ],
)
def test_a_step_sends_what_one_all_reduce_sends_and_holds_one_gradient_more(
    world: World, W: int, micro_group: int, policy: Any
) -> None:
    for told in world(W).run(coordinates_sent, micro_group, policy):
        assert 0.99 <= told["gradient"] <= 1.01
        k = W // micro_group
        # K, the scale, and whether an update was still there
        assert told["scalars"] == (W - 1) * (k * k + 2)
        assert 0.99 * (W > 2) <= told["held"] <= 1.01 * (W > 2)


def add_as_many_ranks() -> None:
    """The way of more than 32 ranks, taken by few."""
    partial_sum = torch.randn(11, dtype=torch.float64) * 10.0 ** torch.arange(-5, 6)
    partial_sum = partial_sum * (dist.get_rank() + 1)
    few = add_in_rank_order(partial_sum, dist.group.WORLD)
    saved, messages.FEW = messages.FEW, 1
    many = add_in_rank_order(partial_sum, dist.group.WORLD)
    messages.FEW = saved
    assert torch.equal(few, many)
    same_everywhere(few)


@pytest.mark.parametrize("W", [2, 3, 4])
def test_beyond_32_ranks_partial_sums_are_added_in_blocks_to_the_same_bits(
    world: World, W: int
) -> None:
    world(W).run(add_as_many_ranks)


def exchange_pieces(sizes: list[int], dtype: torch.dtype) -> None:
    """Pieces of any size, empty ones too, come back as the weighted sum."""
    W, rank = dist.get_world_size(), dist.get_rank()
    rng = torch.Generator().manual_seed(0)
    rows = [[torch.randn(size, generator=rng).to(dtype) for size in sizes] for _ in range(W)]
    mine = [piece.clone() for piece in rows[rank]]
    way = Exchange(dist.group.WORLD)
    for _ in range(2):  # the second time in the memory of the first
        for piece, original in zip(mine, rows[rank], strict=True):
            piece.copy_(original)
            way.send(piece)
        way.receive()
        total = add_in_rank_order(way.local_products().reshape(-1), way.group).view(W, W)
        matrix = torch.stack([torch.cat(row).double() for row in rows])
        torch.testing.assert_close(total, matrix @ matrix.T, rtol=1e-5, atol=1e-5)
        weights = [0.0, *[1 / (W - 1)] * (W - 1)]
        way.give_back(weights)
        way.end()
        torch.testing.assert_close(
            torch.cat(mine).double(),
            matrix[1:].mean(0),
            rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
            atol=1e-2,
        )


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[1], [3, 0, 2], [2**14 + 1, 5, 2**15 - 1]])
def test_pieces_of_any_size_come_back(
    world: World, W: int, sizes: list[int], dtype: torch.dtype
) -> None:
    world(W).run(exchange_pieces, sizes, dtype)


# ------------------------------------------------------------------------- two ranks, the short way


def way_of(model: DistributedDataParallel) -> str:
    way = model._comm_hooks[0][0].__self__.way
    return " by ".join(
        [type(way).__name__, *([type(way.exchange).__name__] if hasattr(way, "exchange") else [])]
    )


def compare_the_short_way(scale: float) -> None:
    """Rows of very different length, nearly orthogonal: the cosine comes from the shorter one."""
    torch.manual_seed(0)
    n = 5000
    a, b = torch.randn(2, n)
    b = (b - a * (a @ b) / (a @ a) + 0.04 * a) / scale
    model, _, handle = attach_model(gaf.GAF(1.0), partial(Vector, n))
    torch.dot(model(torch.ones(1)), [a, b][dist.get_rank()]).backward()
    assert way_of(model) == "OneDecision by Pair"
    exact = 1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    assert handle.last is not None
    assert handle.last.distances[1].item() == pytest.approx(exact.item(), abs=1e-6)
    close(flat_grad(model), (a.double() + b.double()) / 2, torch.stack([a, b]).double())


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3, 1e6])
def test_two_ranks_of_different_norm_are_compared_exactly(world: World, scale: float) -> None:
    world(2).run(compare_the_short_way, scale)


def ways_by_policy() -> list[str]:
    """The policy may be another at each step; each goes its own way and gives its own update."""
    model, optimizer, handle = attach_model(gaf.GAF(0.9), Wide)
    told = []
    policies = [
        gaf.GAF(2.0, average="halving"),
        gaf.Mean(),
        gaf.GAF(2.0, min_accepted=1),
        gaf.GAF(2.0, scope="group"),
        gaf.GAF(2.0, start="worst"),
    ]
    for step, policy in enumerate(policies):
        handle.policy = policy
        rows = micro_gradients(model.module, step, 2)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        close(flat_grad(model), rows.mean(0), rows)
        optimizer.step()
        told.append(way_of(model))
    return told


def test_the_policy_may_change_between_steps(world: World) -> None:
    for told in world(2).run(ways_by_policy):
        pair, general = "OneDecision by Pair", "OneDecision by Exchange"
        assert told == [pair, "PlainAverage", general, "DecisionPerBucket", pair]


def decide_by_bucket() -> tuple[int, int]:
    """Each bucket's parameters get what the algorithm gives on their coordinates alone."""
    W, rank = dist.get_world_size(), dist.get_rank()
    model, optimizer, handle = attach_model(gaf.GAF(1.1, scope="group"), Wide, bucket_cap_mb=0.002)
    moved = stood = 0
    seen: list[list[Tensor]] = []
    settle = handle.settle

    def listening(exchange: Any, params: Any, over: Any) -> None:
        seen.append(list(params))
        settle(exchange, params, over)

    handle.settle = listening  # type: ignore[method-assign]
    for step in range(4):
        seen.clear()
        rows = []
        for r in range(W):
            twin = copy.deepcopy(model.module)
            rows.append(
                dict(
                    zip(
                        model.parameters(),
                        torch.autograd.grad(plain_loss(twin, step, r), list(twin.parameters())),
                        strict=True,
                    )
                )
            )
        before = values(model)
        optimizer.zero_grad()
        plain_loss(model, step, rank).backward()
        assert len(seen) == 1 or step > 0  # DDP builds its buckets after the first pass
        stepped = {}
        for params in seen:
            matrix = torch.stack([torch.cat([row[p].reshape(-1) for p in params]) for row in rows])
            update, decision = gaf.aggregate(matrix, gaf.GAF(1.1))
            torch.testing.assert_close(
                torch.cat([p.grad.reshape(-1) for p in params]), update, rtol=1e-5, atol=1e-7
            )
            stepped |= dict.fromkeys(params, bool(decision.stepped))
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, q) != stepped[p]
            moved, stood = moved + stepped[p], stood + (not stepped[p])
    assert len(seen) > 1
    assert handle.stats()["steps"] == 1 + 3 * len(seen)
    return moved, stood


def test_scope_group_decides_bucket_by_bucket(world: World) -> None:
    for moved, stood in world(2).run(decide_by_bucket):
        assert moved > 0
        assert stood > 0
