"""Ranks: gaf.attach on DistributedDataParallel and FSDP2.

One rank runs over NCCL, two processes on one device over gloo.
"""

import copy
import importlib.util
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gaf
from gaf.rules.row_sums import RowSums
from gpu_parts.common import (
    EXACT,
    FLOAT32,
    HALF,
    NEEDS_CUDA,
    Batch,
    Found,
    Line,
    Network,
    Options,
    Step,
    batches,
    changes,
    emit,
    flat,
    lines,
    mean_loss,
    ratios,
    relative,
    row_of,
    sgd,
    silence,
    state_of,
    waits,
    weights,
)

STEPS = 3
HOST = "127.0.0.1"
LAYOUTS = ("contiguous", "channels last", "transposed")


def one_rank(options: Options) -> Iterator[Line]:
    """World size 1, over NCCL on a GPU: calls every collective; one row is always stepped on."""
    alone(options)
    yield from ddp(options)
    yield from lines("DDP, world 1", partial(waiting, options))
    yield from lines("HSDP, world 1", partial(hsdp, options))
    yield from lines("FSDP2, world 1, scope group", partial(flat_fsdp, options))
    dist.destroy_process_group()


def two_ranks(options: Options) -> Iterator[Line]:
    """Two processes on one device, over gloo: NCCL refuses two ranks on one GPU."""
    yield from spawned(options, ddp_and_hsdp)


def ddp_and_hsdp(options: Options) -> Iterator[Line]:
    yield from ddp(options)
    yield from lines("HSDP, world 2", partial(hsdp, options))


def ratios_of_ranks(options: Options) -> Iterator[Line]:
    """A step of DDP: one rank over NCCL; two over gloo, which uses the host's memory."""
    alone(options)
    yield from ddp_ratios(options)
    dist.destroy_process_group()
    yield from spawned(options, ddp_ratios)


def alone(options: Options) -> None:
    join(options, "nccl" if options.cuda else "gloo", dist.TCPStore(HOST, 0, is_master=True), 0, 1)


def join(options: Options, backend: str, store: Any, rank: int, world: int) -> None:
    silence()
    if importlib.util.find_spec("numpy") is None:
        distributed_c10d._tensor_to_object = object_of
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no network is needed, nor a host's name
    if options.cuda:
        torch.cuda.set_device(options.device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def object_of(tensor: Tensor, size: int, group: Any = None) -> Any:
    """As torch's own, which needs numpy."""
    return pickle.loads(bytes(tensor.cpu().tolist()[:size]))


def spawned(options: Options, part: Callable[[Options], Iterator[Line]]) -> Iterator[Line]:
    """Each rank prints its own lines, so that none is lost if a process hangs.

    Rank 0 prints all of its lines, the other ranks their failures.
    """
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # at any free port
    torch.multiprocessing.spawn(of_rank, (options, part, store.port), nprocs=2)
    yield from ()


def of_rank(
    rank: int, options: Options, part: Callable[[Options], Iterator[Line]], port: int
) -> None:
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    join(options, "gloo", dist.TCPStore(HOST, port), rank, 2)
    for line in part(options):
        if rank == 0 or line.get("ok", True) is False:
            emit(line | {"rank": rank})
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch that outlives the interpreter would abort it, now and then


def ddp(options: Options) -> Iterator[Line]:
    torch.backends.cudnn.deterministic = True  # also in the processes that were started
    world = dist.get_world_size()
    name = f"DDP, world {world}, {dist.get_backend()}"
    for layout, view in itertools.product(LAYOUTS, (False, True)):
        for way, policy in policies(world).items():
            look = partial(same_as_reference, options, policy, layout, view)
            yield from lines(f"{name}, {way}, {layout}{', bucket view' * view}", look)
    yield from lines(f"{name}, bfloat16", partial(half, options))
    yield from lines(f"{name}, plain DDP", partial(same_as_plain, options))
    yield from lines(f"{name}, sums", partial(sums, options))
    for policy in (gaf.Median(), gaf.SignAgreement(world)):
        look = partial(by_coordinates, options, policy)
        yield from lines(f"{name}, {policy}", look)
    yield from lines(f"{name}, all_reduce", partial(reduced, options))
    yield from lines(f"{name}, NaN under Guard", partial(guarded, options))
    yield from lines(f"{name}, skip", partial(skip, options))
    yield from lines(f"{name}, GradScaler", partial(scaled, options))
    yield from lines(f"{name}, default device", partial(default_device, options))


def policies(world: int) -> dict[str, Any]:
    """Between two ranks the first takes the short way, the second the general one."""
    general = gaf.GAF(2.0, min_accepted=1)
    both = {"general way": general, "scope group": gaf.GAF(2.0, scope="group")}
    return both if world == 1 else {"short way": gaf.GAF(2.0)} | both


def wrapped(
    options: Options, layout: str = "contiguous", dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """Buckets of some KiB, so that there are several."""
    model = Network(layout).to(options.device, dtype)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.01, **more)
    return wrapped, sgd(wrapped)


def own_batches(options: Options, count: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Of this rank."""
    world = dist.get_world_size()
    return batches(count * world, options.device, dtype)[dist.get_rank() :: world]


def all_rows(model: nn.Module, batch: Batch) -> Tensor:
    """(W, n) float64: every rank's row."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, row_of(model, batch))
    return torch.stack(rows)


def same_as_reference(options: Options, policy: Any, layout: str, view: bool) -> Found:
    """Two steps: DDP cuts its buckets anew after the first."""
    model, optimizer = wrapped(options, layout, gradient_as_bucket_view=view)
    handle = gaf.attach(model, optimizer, policy)
    far = error = 0.0
    for batch in own_batches(options, 2):
        update, expected = gaf.aggregate(
            all_rows(model.module, batch), gaf.GAF(2.0, min_accepted=1)
        )
        optimizer.zero_grad()
        mean_loss(model, batch).backward()
        assert handle.last is not None
        if handle.policy.scope == "all":  # else the last bucket's
            far = max(far, float((handle.last.distances - expected.distances).abs().max()))
        error = max(error, relative(flat([p.grad for p in model.parameters()]), update))
        optimizer.step()
    yield "distances", far, 0.0, FLOAT32
    yield "update, relative error", error, 0.0, FLOAT32


def half(options: Options) -> Found:
    model, optimizer = wrapped(options, dtype=torch.bfloat16)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0, min_accepted=1))
    (batch,) = own_batches(options, 1, torch.bfloat16)
    update, expected = gaf.aggregate(all_rows(model.module, batch), gaf.GAF(2.0, min_accepted=1))
    mean_loss(model, batch).backward()
    assert handle.last is not None
    yield "distances", float((handle.last.distances - expected.distances).abs().max()), 0.0, 0.005
    error = relative(flat([p.grad for p in model.parameters()]), update)
    yield "update, relative error", error, 0.0, HALF


def trained(options: Options, policy: Any) -> nn.Module:
    model, optimizer = wrapped(options)
    if policy is not None:
        gaf.attach(model, optimizer, policy)
    for batch in own_batches(options, STEPS):
        optimizer.zero_grad()
        mean_loss(model, batch).backward()
        optimizer.step()
    return model


def same_as_plain(options: Options) -> Found:
    plain = trained(options, None)
    for policy in (gaf.Mean(), gaf.Mean(measure_every=2), gaf.Guard()):
        ours = trained(options, policy)
        changed = changes(list(plain.parameters()), list(ours.parameters()))
        yield f"{policy}, parameters of other bits", changed, 0, EXACT
    everything = trained(options, gaf.GAF(2.0))
    yield "tau = 2, relative error", relative(weights(everything), weights(plain)), 0.0, FLOAT32


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, scaler: Any = None
) -> None:
    optimizer.zero_grad()
    loss = mean_loss(model, batch)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def sums(options: Options) -> Found:
    """What an all-reduce shows of the rows, against all of them."""
    model, optimizer = wrapped(options)
    handle = gaf.attach(model, optimizer, gaf.Mean(measure_every=1))
    (batch,) = own_batches(options, 1)
    expected = RowSums.of_gram(gaf.gram(all_rows(model.module, batch)))
    step(model, optimizer, batch)
    assert handle.outcome is not None
    found = torch.tensor(handle.outcome.norms2, dtype=torch.float64, device="cpu")
    yield "norms, relative error", relative(found, expected.norms2.cpu()), 0.0, FLOAT32
    cosine, known = handle.stats()["cosine_mean"], float(expected.cosines.mean())
    yield "cosines, mean", cosine if known == known else 0.0, known if known == known else 0.0, 1e-5


def by_coordinates(options: Options, policy: Any) -> Found:
    """A rule that is no weighted sum."""
    model, optimizer = wrapped(options)
    gaf.attach(model, optimizer, policy)
    (batch,) = own_batches(options, 1)
    update, _ = gaf.aggregate(all_rows(model.module, batch), policy)
    mean_loss(model, batch).backward()
    error = relative(flat([p.grad for p in model.parameters()]), update)
    yield "update, relative error", error, 0.0, FLOAT32


def reduced(options: Options) -> Found:
    """Tensors of one's own, then a call that one rank gets wrong."""
    model, _ = wrapped(options)
    (batch,) = own_batches(options, 1)
    policy = gaf.GAF(2.0, min_accepted=1)
    update, expected = gaf.aggregate(all_rows(model.module, batch), policy)
    params = list(model.module.parameters())
    tensors = list(torch.autograd.grad(mean_loss(model.module, batch), params))
    decision = gaf.all_reduce(tensors, policy)
    yield "accepted", decision.accepted.tolist(), expected.accepted.tolist(), EXACT
    yield "update, relative error", relative(flat(tensors), update), 0.0, FLOAT32
    last = dist.get_rank() == dist.get_world_size() - 1
    try:
        gaf.all_reduce("no tensors" if last else tensors, policy)  # type: ignore[arg-type]
        refused = False
    except (TypeError, RuntimeError):
        refused = True
    yield "a wrong call is refused", refused, True, EXACT


def guarded(options: Options) -> Found:
    """A row that is not finite is left out; a single one leads to a skip."""
    model, optimizer = wrapped(options)
    handle = gaf.attach(model, optimizer, gaf.Guard())
    first, second = own_batches(options, 2)
    step(model, optimizer, first)
    before = state_of(model, optimizer)
    last = dist.get_rank() == dist.get_world_size() - 1
    x, y = second
    step(model, optimizer, (x * float("nan") if last else x, y))
    held = [t.isfinite().all() for t in state_of(model, optimizer)]
    yield "weights are finite", all(map(bool, held)), True, EXACT
    alone = dist.get_world_size() == 1
    moved = changes(before, state_of(model, optimizer)) > 0
    yield "a step was taken", moved, handle.stats()["stepped"] == 2, EXACT
    yield "alarms", [one["rank"] for one in handle.alarms][:1], [0 if alone else 1], EXACT


def skip(options: Options) -> Found:
    """Nothing agrees enough. One rank has no other to disagree with; RandomSkip skips."""
    alone = dist.get_world_size() == 1
    model, optimizer = wrapped(options)
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0))
    first, second = own_batches(options, 2)
    step(model, optimizer, first)
    before = state_of(model, optimizer)
    handle.policy = gaf.RandomSkip(0.0) if alone else gaf.GAF(0.0)
    step(model, optimizer, second)
    yield "steps taken", handle.stats()["stepped"], 1, EXACT
    yield "tensors changed", changes(before, state_of(model, optimizer)), 0, EXACT


def scaled(options: Options) -> Found:
    """An overflow on the last rank alone: nobody steps, and every rank's scale falls."""
    model, optimizer = wrapped(options)
    scaler = torch.amp.GradScaler(options.device.type, init_scale=2.0**10)
    gaf.attach(model, optimizer, gaf.GAF(2.0), scaler=scaler)
    plain = trained(options, gaf.GAF(2.0))
    given = own_batches(options, STEPS)
    for batch in given:
        step(model, optimizer, batch, scaler)
    yield "weights, relative error", relative(weights(model), weights(plain)), 0.0, FLOAT32
    before, scale = state_of(model, optimizer), scaler.get_scale()
    last = dist.get_rank() == dist.get_world_size() - 1
    x, y = given[0]
    step(model, optimizer, (x * float("inf") if last else x, y), scaler)
    yield "scale after an overflow, of that before", scaler.get_scale() / scale, 0.5, EXACT
    yield "tensors changed by an overflow", changes(before, state_of(model, optimizer)), 0, EXACT


def default_device(options: Options) -> Found:
    expected = trained(options, gaf.GAF(2.0))
    torch.set_default_device(options.device)
    try:
        found = trained(options, gaf.GAF(2.0))
    finally:
        torch.set_default_device(None)
    yield "weights, relative error", relative(weights(found), weights(expected)), 0.0, FLOAT32


def waiting(options: Options) -> Found:
    """What filtering adds to DDP's own waits: the one look at the decision."""
    counts = []
    for policy in (None, gaf.GAF(2.0)):
        model, optimizer = wrapped(options)
        if policy is not None:
            gaf.attach(model, optimizer, policy)
        first, *others = own_batches(options, 3)
        for batch in (first, others[0]):
            step(model, optimizer, batch)
        counts.append(waits(options, partial(step, model, optimizer, others[1])))
    plain, ours = counts
    more = NEEDS_CUDA if isinstance(plain, str) or isinstance(ours, str) else ours - plain
    yield "waits in a step beyond plain DDP's", more, 1, EXACT


def hsdp(options: Options) -> Found:
    """Replicas of one shard; against FSDP2's own average. The last steps send during the pass."""
    shape = (dist.get_world_size(), 1)
    mesh = init_device_mesh(options.device.type, shape, mesh_dim_names=("replicate", "shard"))
    ends, steps = [], STEPS + 3
    for policy in (None, gaf.GAF(2.0)):
        model = sharded(options, mesh if policy is None else mesh["shard"])
        optimizer = sgd(model)
        if policy is not None:
            handle = gaf.attach(model, optimizer, policy, group=mesh["replicate"].get_group())
        for batch in own_batches(options, steps):
            step(model, optimizer, batch)
        ends.append(weights(model))
    yield "weights, relative error", relative(ends[1], ends[0]), 0.0, FLOAT32
    yield "steps taken", handle.stats()["stepped"], steps, EXACT
    before = state_of(model, optimizer)
    handle.policy = gaf.RandomSkip(0.0)
    step(model, optimizer, own_batches(options, 1)[0])
    yield "tensors changed by a skip", changes(before, state_of(model, optimizer)), 0, EXACT


def flat_fsdp(options: Options) -> Found:
    mesh, ends = init_device_mesh(options.device.type, (1,)), []
    for policy in (None, gaf.GAF(2.0, scope="group"), gaf.Mean(measure_every=1)):
        model = sharded(options, mesh)
        optimizer = sgd(model)
        if policy is not None:
            gaf.attach(model, optimizer, policy)
        for batch in own_batches(options, STEPS):
            step(model, optimizer, batch)
        ends.append(weights(model))
    yield "weights, relative error", relative(ends[1], ends[0]), 0.0, FLOAT32
    yield "Mean, weights of other bits", int((ends[2] != ends[0]).sum()), 0, EXACT


def sharded(options: Options, mesh: Any) -> nn.Module:
    """Without the scalar, which cannot be sharded."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        last = nn.Linear(512, 64)  # large enough to be cut into slices
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), last
    model = nn.Sequential(*layers).to(options.device)
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp_ratios(options: Options) -> Iterator[Line]:
    """gaf.attach with a tau that accepts everything, gaf.Mean and gaf.Guard, over plain DDP."""
    world = dist.get_world_size()
    subject = f"DDP, world {world}, {dist.get_backend()}"
    settings = {subject: 32, f"{subject}, 224 pixels": 224} if world == 1 else {subject: 32}
    share = replace(options, seconds=options.seconds / len(settings))
    for name, pixels in settings.items():
        yield from ratios(share, name, "plain DDP", ways_of_ddp(options, pixels), together)


def ways_of_ddp(options: Options, pixels: int) -> dict[str, Step]:
    """By name, a warm step of ResNet18 on 128 pictures."""
    from gaf_lab.training import models

    torch.manual_seed(0)
    name, size = ("convnet", 8) if options.small else ("resnet18", 128)
    shape = (3, 32, 32) if options.small else (3, pixels, pixels)
    bare = models.make_model(name, shape, 100, "imagenet")  # type: ignore[arg-type]
    x = torch.randn(size, *shape, device=options.device)
    y = torch.randint(100, (size,), device=options.device)
    ways: dict[str, Step] = {}
    makers: dict[str, Any] = {
        "plain DDP": None,
        "gaf.attach(GAF(2.0))": gaf.GAF(2.0),
        "gaf.attach(Mean())": gaf.Mean(),
        "gaf.attach(Guard())": gaf.Guard(),
    }
    for way, policy in makers.items():
        model = DistributedDataParallel(copy.deepcopy(bare).to(options.device))
        optimizer = sgd(model)
        if policy is not None:
            gaf.attach(model, optimizer, policy)
        ways[way] = partial(step, model, optimizer, (x, y))
        for _ in range(3):  # DDP changes its buckets after the first
            ways[way]()
    return ways


def together(go_on: bool) -> bool:
    """Whether all ranks have time for one more round."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, go_on)
    return all(told)
