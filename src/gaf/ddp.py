"""DistributedDataParallel: a communication hook that sends each bucket on its way and decides at the last one."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gaf.exchange import Exchange
from gaf.handle import Handle
from gaf.policies import Mean

Future = torch.futures.Future[Tensor]  # of the bucket, updated


class Filtered:
    """One decision for all buckets: each is on its way in while the backward pass goes on; the last one decides."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle, self.exchange = handle, exchange
        self.waiting: list[tuple[Future, Tensor]] = []

    def take(self, bucket: GradBucket) -> Future:
        if bucket.index() == 0:
            self.handle.begin()
            self.exchange.begin()
            self.waiting, self.params = [], []
        flat, future = bucket.buffer(), future_on(bucket.buffer())
        self.exchange.send(flat)
        self.params += bucket.parameters()
        self.waiting.append((future, flat))
        if bucket.is_last():
            self.handle.settle(self.exchange, self.params, [self.exchange.group])
            self.handle.end()
            for one, update in self.waiting:
                one.set_result(update)
        return future


class FilteredApart:
    """scope="group": every bucket decides for itself, while the next one is on its way in."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle = handle
        self.under_way: list[tuple[Exchange, list[Any], Tensor, Future]] = []
        self.make = lambda: Exchange(exchange.group, exchange.micro_group)

    def take(self, bucket: GradBucket) -> Future:
        if bucket.index() == 0:
            self.handle.begin()
            self.under_way = []
        exchange, future = self.make(), future_on(bucket.buffer())
        exchange.send(bucket.buffer())
        self.under_way.append((exchange, bucket.parameters(), bucket.buffer(), future))
        while len(self.under_way) > (0 if bucket.is_last() else 1):
            self._settle(*self.under_way.pop(0))
        if bucket.is_last():
            self.handle.end()
        return future

    def _settle(self, exchange: Exchange, params: list[Any], flat: Tensor, future: Future) -> None:
        self.handle.settle(exchange, params, [exchange.group])
        future.set_result(flat)


class Averaged:
    """Plain averaging, bit for bit as without a hook: multiplied by 1/W, then added up."""

    def __init__(self, handle: Handle | None, group: dist.ProcessGroup) -> None:
        self.handle, self.group = handle, group

    def take(self, bucket: GradBucket) -> Any:  # collectives have futures of another class
        if self.handle is not None:
            if bucket.index() == 0:
                self.handle.begin()
                self.params: list[Any] = []
            self.params += bucket.parameters()
            if bucket.is_last():
                self.handle.averaged(self.params)
                self.handle.end()
        flat = bucket.buffer().mul_(1 / dist.get_world_size(self.group))
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


Buckets = Filtered | FilteredApart | Averaged


class Hook:
    """The one communication hook of a model. DDP cannot take it off; what it does can be changed."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets

    @property
    def attached(self) -> bool:
        return self.buckets.handle is not None

    def run(self, state: object, bucket: GradBucket):  # type: ignore[no-untyped-def]  # DDP knows one annotation, not Averaged's
        if bucket.buffer().is_sparse:
            raise TypeError("attach: gradients must be dense; a bucket's is sparse. Use nn.Embedding(..., sparse=False).")
        return self.buckets.take(bucket)


_hooks: WeakKeyDictionary[DistributedDataParallel, Hook] = WeakKeyDictionary()


def hooked(model: DistributedDataParallel) -> Hook | None:
    return _hooks.get(model)


def install(model: DistributedDataParallel, buckets: Buckets) -> None:
    """Makes `buckets` the receiver of the model's buckets.

    Raises:
        RuntimeError: where the model has another hook.
    """
    hook = _hooks.get(model)
    if hook is not None:
        hook.buckets = buckets
        return
    hook = Hook(buckets)
    model.register_comm_hook(None, hook.run)
    _hooks[model] = hook


def watch(model: DistributedDataParallel, handle: Handle) -> None:
    """Has every parameter tell of what it holds before a backward pass adds to it; the first one is listened to."""
    for p in model.parameters():
        if p.requires_grad:
            handle.on_detach(p.register_hook(lambda grad, p=p: handle.before_accumulation(p.grad)).remove)


def buckets_for(handle: Handle, exchange: Exchange) -> Buckets:
    if isinstance(handle.policy, Mean):
        return Averaged(handle, exchange.group)
    apart = getattr(handle.policy, "scope", "all") == "group"
    return FilteredApart(handle, exchange) if apart else Filtered(handle, exchange)


def future_on(tensor: Tensor) -> Future:
    """A future that a CUDA tensor may be the result of: it carries the streams' order along."""
    return torch.futures.Future(devices=[tensor.device] if tensor.device.type == "cuda" else None)
