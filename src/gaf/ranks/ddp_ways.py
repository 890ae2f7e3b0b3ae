"""What one step of DDP does with its buckets: one decision, one for each bucket, or an average."""

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from gaf.ranks.buckets import Future, SentBucket, future_on, kept_gradients
from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle


class OneDecision:
    """One decision for all buckets: each is sent during the backward pass; the last one decides."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle, self.exchange = handle, exchange
        self.sent: list[SentBucket] = []

    def take(self, bucket: GradBucket, first: bool, last: bool) -> Future:
        if first:
            self.exchange.begin()
            self.sent = []
        sent = SentBucket(bucket, self.handle.stale)
        self.exchange.send(sent.flat, partial(kept_gradients, bucket, self.handle.stale))
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

    def take(self, bucket: GradBucket, first: bool, last: bool) -> Future:
        if first:
            self.in_transit, self.number = [], 0
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
    """DDP's own average, bit for bit: multiplied by 1/W, then added up. A skip sends nothing.

    Args:
        params: all that the model's buckets hold.

    Attributes:
        ranks: to divide by.
    """

    def __init__(
        self, handle: Handle | None, group: dist.ProcessGroup, params: list[Tensor]
    ) -> None:
        self.handle, self.group, self.params = handle, group, params
        self.ranks = dist.get_world_size(group)
        self.steps = True

    # -> Any: a collective's get_future() is typed as torch._C.Future, not as torch.futures.Future.
    def take(self, bucket: GradBucket, first: bool, last: bool) -> Any:
        flat = bucket.buffer()
        if first and self.handle is not None:
            self.steps = self.handle.decide_unseen(self.params)
        if last and self.handle is not None:
            self.handle.end()
        if not self.steps:
            future = future_on(flat)
            future.set_result(flat.zero_())
            return future
        work = dist.all_reduce(flat.mul_(1 / self.ranks), group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


Way = PlainAverage | OneDecision | DecisionPerBucket
