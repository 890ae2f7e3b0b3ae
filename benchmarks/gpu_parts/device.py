"""One device: Accumulator, GradScaler, gaf.probe and gaf.Audit against autograd.

The rows are those that autograd alone gives, in float64 on the CPU.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf
from gpu_parts.common import (
    EXACT,
    FLOAT32,
    HALF,
    NEEDS_CUDA,
    TAU,
    Found,
    K,
    Line,
    Network,
    Options,
    batches,
    changes,
    flat,
    lines,
    mean_loss,
    no_wait,
    relative,
    rows_of,
    sgd,
    state_of,
    waits,
    weights,
)

POLICIES: dict[str, Any] = {
    "streamed": partial(gaf.GAF, TAU),
    "streamed, halving": partial(gaf.GAF, TAU, average="halving"),
    "start best": partial(gaf.GAF, TAU, start="best"),
    "start worst": partial(gaf.GAF, TAU, start="worst"),
    "averaging": gaf.Mean,
}
LAYOUTS = ("contiguous", "channels last", "transposed")


def accumulator(options: Options) -> Iterator[Line]:
    """Decisions and updates.

    Policies, layouts, half precision, a skip, how often a step waits, a default device.
    """
    for layout in LAYOUTS:
        for name, make in POLICIES.items():
            look = partial(same_as_reference, options.device, make(), layout, torch.float32)
            yield from lines(f"Accumulator, {name}, {layout}", look)
    for dtype in (torch.bfloat16, torch.float16):
        for name, policy in (
            ("streamed", gaf.GAF(2.0)),
            ("start best", gaf.GAF(2.0, start="best")),
        ):
            look = partial(same_as_reference, options.device, policy, "contiguous", dtype)
            yield from lines(f"Accumulator, {name}, {dtype}", look)
    yield from lines("Accumulator, bfloat16, equal rows", partial(many_rows, options))
    yield from lines("Accumulator, autocast bfloat16", partial(under_autocast, options))
    yield from lines("Accumulator, skip", partial(skip, options))
    layers: dict[str, Any] = {
        "layers": partial(gaf.GAF, TAU, scope="layer"),
        "layers, start best": partial(gaf.GAF, TAU, scope="layer", start="best"),
    }
    for name, make in (POLICIES | layers).items():
        yield from lines(f"Accumulator, {name}", partial(waiting, options, make()))
    yield from lines("default device", partial(default_device, options))


def accumulate(model: nn.Module, policy: Any, given: Any) -> gaf.Accumulator:
    acc = gaf.Accumulator(sgd(model), policy, model=model)
    for batch in given:
        acc.backward(mean_loss(model, batch))
    return acc


def same_as_reference(device: torch.device, policy: Any, layout: str, dtype: torch.dtype) -> Found:
    """Decides on the network's rows; compares with `gaf.aggregate` on the same rows in float64."""
    model = Network(layout).to(device, dtype)
    given = batches(K, device, dtype)
    update, expected = gaf.aggregate(rows_of(model, given), policy)
    decision = accumulate(model, policy, given).decide()
    half = dtype != torch.float32
    if not isinstance(policy, gaf.Mean):
        apart = (decision.distances.cpu() - expected.distances).abs().max()
        yield "distances", float(apart), 0.0, 0.005 if half else FLOAT32
    yield "accepted", decision.accepted.tolist(), expected.accepted.tolist(), EXACT
    error = relative(flat([p.grad for p in model.parameters()]), update)
    yield "update, relative error", error, 0.0, HALF if half else FLOAT32


def many_rows(options: Options) -> Found:
    """bfloat16 parameters, 512 equal rows: every distance is 0, however long the sum is."""
    model = nn.Linear(64, 8).to(options.device, torch.bfloat16)
    rows = 16 if options.small else 512
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), device="cpu")
    batch = x.to(options.device, torch.bfloat16), torch.arange(4, device=options.device)
    decision = accumulate(model, gaf.GAF(2.0), [batch] * rows).step()
    yield "distances", float(decision.distances.abs().max()), 0.0, 0.005


def under_autocast(options: Options) -> Found:
    model = Network().to(options.device)
    given = batches(K, options.device, torch.float32)
    kind = options.device.type
    with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
        update, expected = gaf.aggregate(rows_of(model, given), gaf.GAF(2.0))
        decision = accumulate(model, gaf.GAF(2.0), given).decide()
    yield (
        "distances",
        float((decision.distances.cpu() - expected.distances).abs().max()),
        0.0,
        FLOAT32,
    )
    error = relative(flat([p.grad for p in model.parameters()]), update)
    yield "update, relative error", error, 0.0, FLOAT32


def skip(options: Options) -> Found:
    """After a step, so that there is a state: nothing of it moves."""
    model, given = Network().to(options.device), batches(K, options.device, torch.float32)
    acc = accumulate(model, gaf.GAF(2.0), given)
    acc.step()
    before = state_of(model, acc.optimizers[0])
    acc.policy = gaf.GAF(0.0)
    for batch in given:
        acc.backward(mean_loss(model, batch))
    yield "stepped", bool(acc.step().stepped), False, EXACT
    yield "tensors changed", changes(before, state_of(model, acc.optimizers[0])), 0, EXACT


def waiting(options: Options, policy: Any) -> Found:
    """A micro-batch never waits for the device; a step waits once, to learn whether to step."""
    model, given = Network().to(options.device), batches(K, options.device, torch.float32)
    acc = accumulate(model, policy, given)
    acc.step()
    losses = [mean_loss(model, batch) for batch in given]
    with no_wait(options):
        for loss in losses:
            acc.backward(loss)
    yield "waits in k micro-batches", 0 if options.cuda else NEEDS_CUDA, 0, EXACT
    yield "waits in a step", waits(options, acc.step), 1, EXACT


def default_device(options: Options) -> Found:
    """torch.set_default_device sets where tensors are made; the decisions stay the same."""
    model, given = Network().to(options.device), batches(K, options.device, torch.float32)
    rows = rows_of(model, given)
    for name, make in POLICIES.items():
        policy = make()
        expected = gaf.aggregate(rows, policy)[1].accepted.tolist()
        torch.set_default_device(options.device)
        try:
            decision = accumulate(Network().to(options.device), policy, given).step()
            again = gaf.aggregate(rows, policy)[1]
        finally:
            torch.set_default_device(None)
        yield f"{name}, Accumulator", decision.accepted.tolist(), expected, EXACT
        yield f"{name}, aggregate", again.accepted.tolist(), expected, EXACT


def scaler(options: Options) -> Iterator[Line]:
    """GradScaler: an overflow lowers the scale, a skip does not; scaled equals unscaled."""
    for name, make in OPTIMIZERS.items():
        yield from lines(f"GradScaler, {name}", partial(scaled, options, make))


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.01, fused=True),
}


def scaled(options: Options, make: Any) -> Found:
    made = torch.amp.GradScaler(options.device.type, init_scale=2.0**10)
    given = batches(K, options.device, torch.float32)
    ends = []
    for one in (None, made):  # float32, so that a scale of 2^10 is exact
        model = Network().to(options.device)
        acc = gaf.Accumulator(make(model.parameters()), gaf.GAF(2.0), scaler=one)
        for _ in range(2):
            for batch in given:
                acc.backward(mean_loss(model, batch))
            acc.step()
        ends.append(weights(model))
    yield "weights, relative error", relative(ends[1], ends[0]), 0.0, FLOAT32

    before, scale = state_of(model, acc.optimizers[0]), made.get_scale()
    acc.policy = gaf.GAF(0.0)
    for batch in given:
        acc.backward(mean_loss(model, batch))
    acc.step()
    yield "scale after a skip, of that before", made.get_scale() / scale, 1.0, EXACT
    yield "tensors changed by a skip", changes(before, state_of(model, acc.optimizers[0])), 0, EXACT

    acc.policy = gaf.GAF(2.0)
    for i, (x, y) in enumerate(given):
        acc.backward(mean_loss(model, (x * float("inf") if i == 3 else x, y)))
    acc.step()
    yield "scale after an overflow, of that before", made.get_scale() / scale, 0.5, EXACT
    yield (
        "tensors changed by an overflow",
        changes(before, state_of(model, acc.optimizers[0])),
        0,
        EXACT,
    )


def measures(options: Options) -> Iterator[Line]:
    """gaf.probe and gaf.Audit."""
    for layout in LAYOUTS:
        yield from lines(f"probe, {layout}", partial(probed, options, layout))
    yield from lines("Audit", partial(audited, options))


def probed(options: Options, layout: str) -> Found:
    model = Network(layout).to(options.device)
    given = batches(4 * K, options.device, torch.float32)
    rows, before = rows_of(model, given), [p.detach().clone() for p in model.parameters()]
    found = gaf.probe(model, loss_of_scores, given, k=K)
    yield "K, relative error", relative(found.gram.cpu(), rows @ rows.T), 0.0, FLOAT32
    parts = torch.stack([part.cpu() for part in found.layers.values()]).sum(0)
    yield "the layers' K, relative error", relative(parts, rows @ rows.T), 0.0, FLOAT32
    yield "weights changed", changes(before, list(model.parameters())), 0, EXACT
    torch.set_default_device(options.device)
    try:
        again = gaf.probe(model, loss_of_scores, given, k=K)
    finally:
        torch.set_default_device(None)
    yield (
        "K with a default device, relative error",
        relative(again.gram.cpu(), rows @ rows.T),
        0.0,
        FLOAT32,
    )


def loss_of_scores(scores: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(scores.float(), y)


def audited(options: Options) -> Found:
    """The scores of a Decision on the device are those of the same Decision on the host."""
    model, given = Network().to(options.device), batches(K, options.device, torch.float32)
    members = torch.arange(2 * K, device=options.device).view(K, 2)
    here, there = gaf.Audit(2 * K), gaf.Audit(2 * K)
    decision = accumulate(model, gaf.GAF(TAU, start="best"), given).step()
    here.record(members, decision)
    there.record(
        members.cpu(),
        gaf.aggregate(rows_of(Network().to(options.device), given), gaf.GAF(TAU, start="best"))[1],
    )
    apart = (here.scores().cpu() - there.scores()).nan_to_num(nan=1.0).abs().max()
    yield "scores", float(apart), 0.0, FLOAT32
