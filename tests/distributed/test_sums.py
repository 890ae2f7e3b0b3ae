"""The way of sums: DDP's average bit for bit, and what it shows of each rank."""

import math
import socket
import statistics
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from gaf.ranks.messages import add_in_rank_order
from gaf.ranks.sums import Sums
from gaf.rules.row_sums import RowSums
from helpers.attached import (
    Vector,
    attach_model,
    branch_loss,
    equal,
    loss,
    momentum,
    net,
    row_loss,
    values,
)
from helpers.plain_ddp import (
    MODES,
    compare_in_all_modes,
    compare_in_many_modes,
    compare_with_plain_ddp,
)
from helpers.problems import Odd, Wide, flat_grad, micro_gradients, plain_loss, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed

EACH = gaf.Mean(measure_every=1)
THIRD = gaf.Mean(measure_every=3)


# ---------------------------------------------------------------------------- the sums and the rows


def sums_of(exchange: Sums, flats: list[Tensor], weights: list[float] | None) -> Any:
    """What the exchange shows, and the flats at the end. weights: None for a skip."""
    exchange.begin()
    for flat in flats:
        exchange.send(flat)
    exchange.receive()
    share = exchange.local_products()
    seen = exchange.seen_in(add_in_rank_order(share.reshape(-1), exchange.group).view_as(share))
    if weights is None:
        exchange.fill(0.0)
    else:
        exchange.give_back(weights)
    exchange.end()
    return seen


def compare_with_rows(dtype: torch.dtype) -> None:
    W, rank = dist.get_world_size(), dist.get_rank()
    assert dist.group.WORLD is not None
    exchange = Sums(dist.group.WORLD)
    pieces = [100, 1, 70_000]
    rows = torch.randn(W, sum(pieces), generator=torch.Generator().manual_seed(1)) + 0.1
    rows = rows.to(dtype)
    some = [0.0] + [1 / (W - 1)] * (W - 1)
    expected = RowSums.of_gram(rows.double() @ rows.double().T)
    for weights in ([1 / W] * W, [0.5 / W] * W, some, None):
        flats = list(rows[rank].clone().split(pieces))
        plain = [flat.mul(1 / W) for flat in flats]
        for flat in plain:
            dist.all_reduce(flat)
        seen = sums_of(exchange, flats, weights)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        lengths = expected.norms2.sqrt() * expected.total2.sqrt()
        assert ((seen.norms2 / expected.norms2 - 1).abs() < tolerance).all()
        assert ((seen.inner - expected.inner).abs() < tolerance * lengths).all()
        assert abs(seen.signal - expected.signal) < tolerance * lengths.mean()
        torch.testing.assert_close(seen.cosines, expected.cosines, rtol=0, atol=4 * tolerance)
        update = torch.cat(flats)
        if weights == [1 / W] * W:
            assert torch.equal(update, torch.cat(plain))
        elif weights == [0.5 / W] * W:
            assert torch.equal(update, torch.cat(plain) * 0.5)
        elif weights is None:
            assert not update.any()
        else:
            error = (update - rows[1:].double().mean(0)).norm()
            assert error < (1e-6 if dtype == torch.float32 else 1e-2) * update.norm()


@pytest.mark.parametrize("W", [2, 3, 4])
def test_the_sums_are_those_of_stacked_rows(world: World, W: int) -> None:
    """In pieces that are copied; weights of all rows, scaled, without a row, and of a skip."""
    for dtype in (torch.float32, torch.bfloat16):
        world(W).run(compare_with_rows, dtype)


def test_rows_of_zeros_are_no_pair() -> None:
    """|g|^2 is the mean over pairs of present rows, as `gaf.rules.agreement` has it from K."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    assert float(RowSums.of_gram(rows @ rows.T).signal) == pytest.approx(0.6)
    alone = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert math.isnan(float(RowSums.of_gram(alone @ alone.T).signal))


# --------------------------------------------------------------------------- plain DDP, bit for bit


def two_passes(model: nn.Module, step: int) -> None:
    """Both synchronise, and their gradients are added up."""
    plain_loss(model, 2 * step, dist.get_rank()).backward()
    plain_loss(model, 2 * step + 1, dist.get_rank()).backward()


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.parts[which](x)


def part_by_part(model: nn.Module, step: int) -> None:
    """Two passes over different parameters."""
    for which in range(2):
        branch_loss(model, which, step).backward()


@pytest.mark.parametrize("W", [2, 3, 4])
def test_measured_steps_are_plain_ddps_bit_for_bit(world: World, W: int) -> None:
    world(W).run(compare_in_many_modes, THIRD)


def add_up_passes() -> None:
    for run, make in ((two_passes, Odd), (part_by_part, Apart)):
        mixed = run is two_passes
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            handle = compare_with_plain_ddp(EACH, 6, make, run, find_unused_parameters=not mixed)
        told = [one for one in told if "added to the last update" in str(one.message)]
        assert len(told) == mixed
        assert all(math.isnan(worker["cosine"]) == mixed for worker in handle.workers())


@pytest.mark.parametrize("W", [2, 3])
def test_several_passes_of_a_step_are_plain_ddps_too(world: World, W: int) -> None:
    """A gradient that was added to an update is not measured, and a warning says so."""
    world(W).run(add_up_passes)


@pytest.mark.slow
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_plain_ddps_bit_for_bit(world: World, W: int, mode: str) -> None:
    world(W).run(compare_in_all_modes, EACH, mode)


def run_out_of_data(initial: bool) -> None:
    """Ranks have 2, 3, ... batches."""
    ends, rank, W = [], dist.get_rank(), dist.get_world_size()
    for policy in (None, gaf.Mean(measure_every=1), gaf.Mean(measure_every=2)):
        model = net(6, 8, 3)
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6)
        optimizer = momentum(model)
        handle = None if policy is None else gaf.attach(wrapped, optimizer, policy)
        with wrapped.join(divide_by_initial_world_size=initial):
            for step in range(2 + rank):
                optimizer.zero_grad()
                loss(wrapped, step).backward()
                optimizer.step()
        ends.append(values(model))
        if handle is not None:
            every = policy.measure_every
            stats, workers = handle.stats(), handle.workers()
            assert stats["steps"] == W + 1
            measured = range(0, W + 1, every)
            absent = [sum(step >= 2 + r for step in measured) for r in range(W)]
            assert stats["absent_per_row"] == absent
            assert all(one["finite"] == 1 and one["left_out"] == 0 for one in workers)
    same_everywhere(*ends[0])
    assert all(torch.equal(p, q) for end in ends[1:] for p, q in zip(ends[0], end, strict=True))


@pytest.mark.parametrize("initial", [True, False])
def test_ranks_that_have_joined_are_rows_of_zeros(world: World, initial: bool) -> None:
    world(3).run(run_out_of_data, initial)


# --------------------------------------------------------------------------------- what is measured


def measure(every: int, steps: int = 7) -> tuple[Any, ...]:
    """Stats and workers against all micro-gradients in float64."""
    model, optimizer, handle = attach_model(gaf.Mean(measure_every=every), Wide)
    W, rank = dist.get_world_size(), dist.get_rank()
    assert math.isnan(handle.stats()["cosine_mean"])
    assert math.isnan(handle.workers()[0]["norm"])
    cosines, norms, norms2, signals = [], [], [], []
    for step in range(steps):
        rows = micro_gradients(model.module, step, W)
        optimizer.zero_grad()
        plain_loss(model, step, rank).backward()
        optimizer.step()
        if step % every == 0:
            assert handle.outcome is not None
            assert handle.last is not None
            sums = RowSums.of_gram(rows @ rows.T)
            assert handle.outcome.norms2 == pytest.approx(sums.norms2.tolist(), rel=1e-5)
            assert handle.outcome.cosines == pytest.approx(sums.cosines.tolist(), abs=1e-5)
            assert (handle.last.distances - (1 - sums.cosines)).abs().max() < 1e-5
            lengths = rows.norm(dim=1)
            norms.append((lengths / statistics.median(lengths.tolist())).tolist())
            cosines.append(sums.cosines.tolist())
            norms2.append(float(sums.norms2.mean()))
            signals.append(float(sums.signal))
        else:
            assert handle.outcome is not None
            assert not handle.outcome.measured
    stats, workers = handle.stats(b=6), handle.workers()
    assert stats["steps"] == stats["stepped"] == steps
    known = [value for row in cosines for value in row]
    assert stats["cosine_mean"] == pytest.approx(statistics.mean(known), abs=1e-5)
    assert stats["cosine_min"] == pytest.approx(min(known), abs=1e-5)
    assert stats["distance_mean"] == pytest.approx(1 - statistics.mean(known), abs=1e-5)
    assert stats["distance_min"] == pytest.approx(1 - max(known), abs=1e-5)
    assert stats["acceptance"] == 1
    noise = 6 * (sum(norms2) - sum(signals)) / sum(signals) if sum(signals) > 0 else math.inf
    assert stats["noise_scale"] == pytest.approx(noise, rel=1e-3)
    assert len(workers) == W
    for i, worker in enumerate(workers):
        assert (worker["rank"], worker["host"]) == (i, socket.gethostname())
        assert worker["norm"] == pytest.approx(statistics.mean(row[i] for row in norms), rel=1e-5)
        assert worker["cosine"] == pytest.approx(
            statistics.mean(row[i] for row in cosines), abs=1e-5
        )
        assert (worker["finite"], worker["left_out"]) == (1, 0)
    return stats, workers, handle.state_dict()


@pytest.mark.parametrize("W", [2, 3, 4])
def test_stats_and_workers_are_those_of_all_rows(world: World, W: int) -> None:
    for every in (1, 3):
        first, *others = world(W).run(measure, every)
        assert all(repr(other) == repr(first) for other in others)  # NaN is NaN there


def follow_all_policies() -> None:
    """From K the same, for a policy that filters; micro-groups name their ranks."""
    model, optimizer, handle = attach_model(gaf.GAF(2.0), Wide)
    W, rank = dist.get_world_size(), dist.get_rank()
    rows = micro_gradients(model.module, 0, W)
    plain_loss(model, 0, rank).backward()
    optimizer.step()
    cosines = RowSums.of_gram(rows @ rows.T).cosines
    assert [w["cosine"] for w in handle.workers()] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert handle.stats()["cosine_mean"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    handle.detach()
    handle = gaf.attach(model, optimizer, gaf.GAF(0.0, min_accepted=1), micro_group=2)
    optimizer.zero_grad()
    plain_loss(model, 0, rank).backward()
    optimizer.step()
    first, second = handle.workers()
    assert (first["rank"], first["ranks"], second["ranks"]) == (0, [0, 1], [2, 3])
    assert (first["left_out"], second["left_out"]) == (0, 1)
    handle.detach()
    with pytest.raises(ValueError, match="with micro_group above 1 measure_every must be 0"):
        gaf.attach(model, optimizer, gaf.Mean(measure_every=2), micro_group=2)


def test_every_policy_that_measures_tells_of_its_workers(world: World) -> None:
    world(4).run(follow_all_policies)


def save_and_restore() -> None:
    """Steps 0, 3 and 6 are measured, also if the run stops after step 4 and is resumed."""
    whole, _, handle = broken_off(None)
    again, measured, restored = broken_off(5)
    assert measured == [True, False, False, True, False, False, True, False]
    assert equal(whole, values(again))
    assert repr(handle.state_dict()) == repr(restored.state_dict())
    assert repr(handle.workers()) == repr(restored.workers())
    assert handle.state_dict()["policy"] == {"step": 8}
    old = handle.state_dict()
    del old["workers"]  # a state from before they were followed
    old["telemetry"]["recent"] = [row[:8] for row in old["telemetry"]["recent"]]
    restored.load_state_dict(old)
    assert restored.stats()["distance_mean"] == handle.stats()["distance_mean"]
    assert math.isnan(restored.stats()["cosine_mean"])


def broken_off(at: int | None) -> tuple[nn.Module, list[bool], gaf.Handle]:
    """A run of 8 steps; at: the step before which it is saved and loaded by a new handle."""
    model, optimizer, handle = attach_model(gaf.Mean(measure_every=3))
    measured = []
    for step in range(8):
        if step == at:
            state = handle.state_dict()
            handle.detach()
            handle = gaf.attach(model, optimizer, gaf.Mean(measure_every=3))
            handle.load_state_dict(state)
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        plain_loss(model, 99, dist.get_rank()).detach()
        optimizer.step()
        assert handle.outcome is not None
        measured.append(handle.outcome.measured)
    return model, measured, handle


def test_a_run_that_goes_on_measures_the_same_steps(world: World) -> None:
    world(2).run(save_and_restore)


def overflow() -> None:
    """A NaN goes through, as under plain DDP: the scale falls, and the step is measured anew."""
    ends = []
    for attached in (False, True):
        scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        torch.manual_seed(3)
        model = DistributedDataParallel(Vector())
        optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
        policy = gaf.Mean(measure_every=2)
        handle = gaf.attach(model, optimizer, policy, scaler=scaler) if attached else None
        scales = []
        for step in range(5):
            row = [1.0, 0.5, float(dist.get_rank())]
            if step == 2 and dist.get_rank() == 1:
                row[0] = math.inf
            optimizer.zero_grad()
            scaler.scale(row_loss(model, row)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        ends.append((flat_grad(model), values(model), scales))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1][0], ends[1][1][0])
    assert ends[0][2] == ends[1][2] == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
    assert handle is not None
    assert handle.stats()["steps"] == 4
    assert handle.workers()[0]["finite"] == 1
    first = torch.tensor([1.0, 0.5, 0.0])
    others = torch.tensor([1.0, 0.5, 1.0])
    cosine = torch.nn.functional.cosine_similarity(first, others, dim=0)
    assert handle.stats()["cosine_mean"] == pytest.approx(float(cosine))
    assert handle.outcome is not None
    assert handle.outcome.norms2 == []  # step 4 is the fourth that counts


def test_an_overflow_is_plain_ddps(world: World) -> None:
    world(2).run(overflow)


# --------------------------------------------------------------------------------------------- HSDP


def replicas(policy: Any) -> tuple[list[list[Tensor]], gaf.Handle]:
    """Weights after each of 7 steps, on 2 or more replicas of 2 shards."""
    W = dist.get_world_size()
    mesh = init_device_mesh("cpu", (W // 2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(3)
    model = fully_shard(Wide(), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    handle = gaf.attach(model, optimizer, policy, group=mesh["replicate"])
    ends = []
    for step in range(7):
        optimizer.zero_grad()
        plain_loss(model, step, dist.get_rank()).backward()
        optimizer.step()
        ends.append([p.detach().to_local().clone() for p in model.parameters()])  # type: ignore
    return ends, handle


def measure_replicas() -> tuple[Any, ...]:
    ends, handle = replicas(gaf.Mean())
    assert math.isnan(handle.stats()["cosine_mean"])
    results = []
    for policy in (EACH, THIRD, gaf.Guard()):
        others, handle = replicas(policy)
        pairs = zip(ends, others, strict=True)
        assert all(torch.equal(p, q) for a, b in pairs for p, q in zip(a, b, strict=True))
        results.append((handle.workers(), handle.stats(), handle.alarms))
    each, third, guard = (workers for workers, _, _ in results)
    assert [worker["ranks"] for worker in each] == [[0, 1], [2, 3]]
    assert [worker["rank"] for worker in each] == [0, 2]
    assert all(-1 < worker["cosine"] < 1 for worker in (*each, *third, *guard))
    assert each[0]["cosine"] == pytest.approx(each[1]["cosine"])  # of two rows
    assert each != third
    assert each == guard
    return results


def test_replicas_are_measured_and_guarded_with_the_bits_of_the_plain_average(world: World) -> None:
    first, *others = world(4).run(measure_replicas)
    assert all(repr(other) == repr(first) for other in others)


# --------------------------------------------------------------------------------------- flat FSDP2


def shard_flatly(policy: Any, dtype: torch.dtype, reduce: torch.dtype | None) -> Any:
    """Model, optimizer and handle; the last linear layer is a parameter group of its own."""
    torch.manual_seed(3)
    model = Wide(dtype)
    mixed = MixedPrecisionPolicy(reduce_dtype=reduce)
    fully_shard(model.layers[-1], mp_policy=mixed)
    fully_shard(model, mp_policy=mixed)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    return model, optimizer, None if policy is None else gaf.attach(model, optimizer, policy)


def measure_shards(dtype: torch.dtype, reduce: torch.dtype | None) -> Any:
    rank, W = dist.get_rank(), dist.get_world_size()
    model, optimizer, handle = shard_flatly(gaf.Mean(measure_every=2), dtype, reduce)
    plain, other, _ = shard_flatly(None, dtype, reduce)
    tolerance = 1e-2 if torch.bfloat16 in (dtype, reduce) else 1e-5
    norms2, signals = [], []
    for step in range(6):
        whole = Wide(dtype)
        full = {name: p.full_tensor() for name, p in plain.named_parameters()}
        whole.load_state_dict(full)
        rows = micro_gradients(whole, step, W)
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad(set_to_none=step % 3 > 0)
            torch.autograd.grad(plain_loss(m, step, rank), m.layers[0].weight)  # for a log
            plain_loss(m, step, rank).backward()
            o.step()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs), step
        assert handle.outcome.measured == (step % 2 == 0)
        if handle.outcome.measured:
            expected = RowSums.of_gram(rows @ rows.T)
            assert handle.outcome.norms2 == pytest.approx(expected.norms2.tolist(), rel=tolerance)
            error = handle.outcome.signal - float(expected.signal)
            assert abs(error) < tolerance * float(expected.norms2.mean())
            norms2.append(statistics.mean(handle.outcome.norms2))
            signals.append(handle.outcome.signal)
    stats, workers = handle.stats(), handle.workers()
    noise = (sum(norms2) - sum(signals)) / sum(signals) if sum(signals) > 0 else math.inf
    assert stats["noise_scale"] == pytest.approx(noise)
    assert 0 < stats["norm_dispersion"] < 1
    assert math.isnan(stats["cosine_mean"])
    assert (stats["steps"], stats["absent"], stats["rejected"]) == (6, 0, 0)
    assert [worker["rank"] for worker in workers] == list(range(W))
    assert all(worker["finite"] == 1 and worker["norm"] > 0 for worker in workers)
    return stats, workers


@pytest.mark.parametrize("W", [2, 3, 4])
def test_flat_shards_show_norms_and_noise_and_keep_their_bits(world: World, W: int) -> None:
    kinds: list[Any] = [(torch.float32, None)]
    if W == 4:
        kinds += [(torch.float64, None), (torch.float32, torch.bfloat16)]
    for dtype, reduce in kinds:
        first, *others = world(W).run(measure_shards, dtype, reduce)
        assert all(repr(other) == repr(first) for other in others)


def refuse_to_choose() -> None:
    _, _, handle = shard_flatly(gaf.Mean(), torch.float32, None)
    handle.policy = gaf.Mean(measure_every=1)
    for policy in (gaf.GAF(), gaf.Guard(), gaf.RandomSkip(0.5)):
        with pytest.raises(ValueError, match="a flat FSDP2 model that was attached with gaf.Mean"):
            handle.policy = policy


def test_flat_shards_leave_nothing_to_choose_from(world: World) -> None:
    world(2).run(refuse_to_choose)
