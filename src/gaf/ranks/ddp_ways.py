"""What one step of DDP does with its buckets: one decision, one for each bucket, or an average."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from gaf.ranks.buckets import BucketPiece, Future, SentBucket, future_on
from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.ranks.metric import moments_for
from gaf.ranks.pair import Pair
from gaf.ranks.sums import Sums
from gaf.rules.averaging import averages, measures, measures_next
from gaf.rules.contract import Policy, judges_sums, metric_of, needs_cosines, scope_of
from gaf.rules.policies import GAF
from gaf.rules.second_moments import SecondMoments


class OneDecision:
    """One decision for all buckets: each is sent during the backward pass; the last one decides.

    Args:
        pointers: see `BucketPiece`.
        sets_aside: whether updates of an earlier pass of the same step stay out of the rows. DDP
            itself averages them again.
    """

    def __init__(
        self,
        handle: Handle,
        exchange: Exchange,
        pointers: dict[Tensor, int],
        sets_aside: bool = True,
    ) -> None:
        self.handle, self.exchange, self.pointers = handle, exchange, pointers
        self.sets_aside = sets_aside
        self.moments: SecondMoments | None = None  # for the pass's metric
        self.sent: list[SentBucket] = []

    def begin(self, ranks: int) -> None:
        self.exchange.begin()
        self.exchange.active = ranks
        if isinstance(self.exchange, Sums):
            self.exchange.multiplies = needs_cosines(self.handle.policy)
        self.moments = moments_for(self.handle)
        self.sent = []

    def take(self, bucket: GradBucket, last: bool) -> Future:
        sent = SentBucket(bucket, self.handle.stale if self.sets_aside else None)
        piece = BucketPiece(bucket, self.handle.stale, self.pointers, self.moments)
        self.exchange.send(sent.flat, piece)
        self.sent.append(sent)
        if last:
            self._settle()
        return sent.future

    def _settle(self) -> None:
        params = [p for sent in self.sent for p in sent.params]
        self.handle.settle(self.exchange, params, self.handle.summed_groups)
        for sent in self.sent:
            sent.put_back()
        self.handle.end()
        for sent in self.sent:
            sent.release()
        self.sent = []  # DDP may free its buckets


class DecisionPerBucket:
    """scope="group": every bucket decides for itself, while the next one is on its way in."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle = handle
        self.in_transit: list[tuple[Exchange, SentBucket]] = []
        self.number = 0  # of the bucket in its pass
        self.make = partial(Exchange, exchange.group, exchange.micro_group)

    def begin(self, ranks: int) -> None:
        self.in_transit, self.number = [], 0

    def take(self, bucket: GradBucket, last: bool) -> Future:
        self.number += 1
        sent, exchange = SentBucket(bucket, self.handle.stale), self.make(tag=self.number)
        exchange.send(sent.flat)
        self.in_transit.append((exchange, sent))
        while len(self.in_transit) > (0 if last else 1):
            self._settle(*self.in_transit.pop(0))
        if last:
            self.handle.end()
        return sent.future

    def _settle(self, exchange: Exchange, sent: SentBucket) -> None:
        self.handle.settle(exchange, sent.params, [exchange.group])
        sent.put_back()
        sent.release()


class PlainAverage:
    """DDP's own average, bit for bit: divided, then added up. A skip sends nothing.

    Args:
        params: all that the model's buckets hold.
        pointers: see `BucketPiece`.

    Attributes:
        ranks: to divide by.
    """

    def __init__(
        self,
        handle: Handle | None,
        group: dist.ProcessGroup,
        params: list[Tensor],
        pointers: dict[Tensor, int],
    ) -> None:
        self.handle, self.group, self.params, self.pointers = handle, group, params, pointers
        self.ranks = dist.get_world_size(group)
        self.steps = True

    def begin(self, ranks: int) -> None:
        self.ranks = ranks
        if self.handle is not None:
            self.steps = self.handle.decide_unseen(self.params)

    # -> Any: a collective's get_future() is typed as torch._C.Future, not as torch.futures.Future.
    def take(self, bucket: GradBucket, last: bool) -> Any:
        flat = bucket.buffer()
        if last and self.handle is not None:
            self.handle.end()
        if not self.steps:
            future = future_on(flat)
            future.set_result(flat.zero_())
            return future
        BucketPiece(bucket, None, self.pointers).divide(self.ranks)
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


class MeasuredAverage:
    """The plain average, of which every n-th is measured: `Mean(measure_every=n)`.

    Args:
        policy: counts the steps.
        plain, measured: two ways to the same average.
    """

    def __init__(self, policy: Policy, plain: PlainAverage, measured: OneDecision) -> None:
        self.policy, self.plain, self.measured = policy, plain, measured
        self.way: PlainAverage | OneDecision = plain

    def begin(self, ranks: int) -> None:
        self.way = self.measured if measures_next(self.policy) else self.plain
        self.way.begin(ranks)

    def take(self, bucket: GradBucket, last: bool) -> Any:
        return self.way.take(bucket, last)


Way = PlainAverage | OneDecision | DecisionPerBucket | MeasuredAverage


def choose_way(handle: Handle, exchange: Exchange, policy: Policy, plain: PlainAverage) -> Way:
    """The cheapest way that a policy allows."""
    apart = exchange.k == exchange.W  # each rank is a row
    if averages(policy):
        measured = OneDecision(handle, Sums(exchange.group), plain.pointers, sets_aside=False)
        return MeasuredAverage(policy, plain, measured) if measures(policy) else plain
    if scope_of(policy) == "group":
        return DecisionPerBucket(handle, exchange)
    if metric_of(policy) == "optimizer":  # sums have no part of M at hand
        return OneDecision(handle, exchange, plain.pointers)
    if apart and judges_sums(policy):
        return OneDecision(handle, Sums(exchange.group), plain.pointers)
    mean_or_skip = type(policy) is GAF and policy.min_accepted == 2
    wide = all(p.dtype in (torch.float32, torch.float64) for p in plain.params)
    if apart and exchange.W == 2 and mean_or_skip and wide:
        return OneDecision(handle, Pair(exchange.group), plain.pointers)
    return OneDecision(handle, exchange, plain.pointers)
