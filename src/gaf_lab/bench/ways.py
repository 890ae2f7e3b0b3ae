"""Ways from k ranks' gradients to one update: plain DDP, gaf.attach, gathering them all."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gaf
from gaf.ranks.exchange import Exchange
from gaf.ranks.judged import judge_seen
from gaf.ranks.messages import add_in_rank_order
from gaf.ranks.pair import Pair
from gaf.ranks.sums import Sums
from gaf.rules.contract import Policy, merge_of
from gaf_lab.training import models

PLAIN, GAF, NAIVE = "plain DDP", "gaf.attach", "gather all"
MEASURED_EVERY = 10
MEASURED, GUARD = f"Mean({MEASURED_EVERY})", "Guard"  # by gaf.attach too
# steps between measured ones; Guard looks at cosines in every fourth step, and on suspicion in
# others: among 4 workers in a third of all
PERIODS = {MEASURED: MEASURED_EVERY, GUARD: 3}
MEDIAN, SIGNS, UPGRAD = "Median", "SignAgreement", "TorchJD UPGrad"
WAYS = (PLAIN, MEASURED, GUARD, GAF, NAIVE)
RULES = (MEDIAN, SIGNS, *([UPGRAD] if find_spec("torchjd") else []))
RULE_WAYS = (PLAIN, GAF, *RULES, NAIVE)  # of gaf bench ddp --rules
TAU = 2.0  # accepts every row: the most work, and both ways over the network
ATTACHED: dict[str, Callable[[], Policy]] = {
    MEASURED: lambda: gaf.Mean(measure_every=MEASURED_EVERY),
    GUARD: gaf.Guard,
    GAF: lambda: gaf.GAF(TAU),
    MEDIAN: gaf.Median,
    SIGNS: lambda: gaf.SignAgreement(2),
    UPGRAD: lambda: import_module("torchjd.aggregation").UPGradWeighting(),
}
CLASSES = 100


Step = Callable[..., None]  # (measured)


def build_model(name: str, stem: models.Stem) -> nn.Module:
    torch.manual_seed(0)
    return models.make_model(name, (3, 32, 32), CLASSES, stem)


def make_rank_step(way: str, name: str, stem: models.Stem, b: int) -> tuple[Step, nn.Module]:
    """A training step of a fresh model on this rank, and that model.

    A step of a way that has a period is told whether it is one that is measured. The model is bare
    for NAIVE, else in DistributedDataParallel.
    """
    bare = build_model(name, stem)
    model = bare if way == NAIVE else DistributedDataParallel(bare)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    rng = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.randn(b, 3, 32, 32, generator=rng), torch.randint(0, CLASSES, (b,), generator=rng)
    handle = gaf.attach(model, optimizer, ATTACHED[way]()) if way in ATTACHED else None
    states = states_before(handle.policy) if handle is not None and way in PERIODS else {}

    def step(measured: bool = True) -> None:
        if handle is not None and states:
            handle.policy.load_state_dict(states[measured])  # type: ignore[attr-defined]
        nn.functional.cross_entropy(model(x), y).backward()
        if way == NAIVE:
            share_all(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def states_before(policy: Any) -> dict[bool, Any]:
    """What a policy has learned before a step that is measured, and before one that is not."""
    fresh = policy.state_dict()
    count = "step" if "step" in fresh and isinstance(fresh["step"], int) else "decisions"
    late = 100 * MEASURED_EVERY * gaf.Guard().cosine_every  # Guard looks closely at first
    return {measured: fresh | {count: late + (not measured)} for measured in (True, False)}


def share_all(params: Sequence[nn.Parameter]) -> None:
    """The published scripts' way: every rank receives every gradient, and filters for itself."""
    grads = [p.grad for p in params if p.grad is not None]
    update = filter_rows(gather_all(torch.cat([g.view(-1) for g in grads])))
    for p, part in zip(params, update.split([g.numel() for g in grads]), strict=True):
        p.grad = part.view_as(p)


def gather_all(flat: Tensor, group: "dist.ProcessGroup | None" = None) -> list[Tensor]:
    """Every rank's; group: of all ranks, or of these."""
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, flat, group=group)
    return rows


def filter_rows(rows: list[Tensor], tau: float = TAU) -> Tensor:
    """The average of the rows that agree with the sum of those before them."""
    total, count = rows[0].clone(), 1
    for row in rows[1:]:
        if 1 - nn.functional.cosine_similarity(total, row, dim=0) <= tau:
            total += row
            count += 1
    return total / count


def mean_step(way: str, cost: Callable[[bool], float]) -> float:
    """A step's cost on average. cost: of a step that is measured, or is not."""
    period = PERIODS.get(way)
    if period is None:
        return cost(True)
    return (cost(True) + (period - 1) * cost(False)) / period


def make_aggregate(way: str) -> Callable[[list[Tensor], bool], Any]:
    """The aggregation without the passes: takes this rank's flat buckets.

    That of a way with a period is told whether the step is one that is measured.
    """
    if way == PLAIN:
        return lambda buckets, measured: all_reduce_buckets(buckets)
    if way == NAIVE:
        return lambda buckets, measured: gather_and_filter(buckets)
    exchange, policy = exchange_of(way), ATTACHED[way]()

    def aggregate(buckets: list[Tensor], measured: bool) -> None:
        if way == MEASURED and not measured:
            average_buckets(buckets)
            return
        if isinstance(exchange, Sums):
            exchange.multiplies = measured
        exchange_buckets(exchange, policy, buckets)

    return aggregate


def exchange_of(way: str) -> Exchange:
    assert dist.group.WORLD is not None
    pair = way == GAF and dist.get_world_size() == 2
    kind = Pair if pair else Sums if way in (MEASURED, GUARD) else Exchange
    return kind(dist.group.WORLD)


def gather_and_filter(buckets: list[Tensor]) -> Tensor:
    return filter_rows(gather_all(torch.cat(buckets)))


def average_buckets(buckets: list[Tensor]) -> None:
    for bucket in buckets:
        bucket.mul_(1 / dist.get_world_size())
    all_reduce_buckets(buckets)


def all_reduce_buckets(buckets: list[Tensor]) -> None:
    works = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
    for work in works:
        work.wait()


def exchange_buckets(exchange: Exchange, policy: Policy, buckets: list[Tensor]) -> None:
    exchange.begin()
    for bucket in buckets:
        exchange.send(bucket)
    exchange.receive()
    partial = exchange.local_products()
    total = add_in_rank_order(partial.reshape(-1), exchange.group).view_as(partial)
    decision, _ = judge_seen(policy, exchange.seen_in(total))
    exchange.give_back(decision.weights.tolist(), merge_of(policy))
    exchange.end()
