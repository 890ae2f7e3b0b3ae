"""DistributedDataParallel: a communication hook that sends each bucket on its way and decides at the last one."""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gaf.combine import Policy
from gaf.exchange import Exchange, Pair
from gaf.handle import Handle
from gaf.policies import GAF, Mean
from gaf.sequential import Sequential

Future = torch.futures.Future[Tensor]  # of the bucket, updated


class Filtered:
    """One decision for all buckets: each is on its way in while the backward pass goes on; the last one decides."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle, self.exchange = handle, exchange
        self.waiting: list[tuple[Future, Tensor]] = []

    def take(self, bucket: GradBucket, first: bool, last: bool) -> Future:
        if first:
            self.handle.begin()
            self.exchange.begin()
            self.waiting, self.params = [], []
        flat, future = bucket.buffer(), future_on(bucket.buffer())
        if isinstance(self.exchange, Pair):
            self.exchange.send(flat, *self._unchanged(bucket))
        else:
            self.exchange.send(flat)
        self.params += bucket.parameters()
        self.waiting.append((future, flat))
        if last:
            self.handle.settle(self.exchange, self.params, [self.exchange.group])
            self.handle.end()
            for one, update in self.waiting:
                one.set_result(update)
            self.waiting, self.params = [], []  # DDP may free its buckets
        return future

    def _unchanged(self, bucket: GradBucket) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's gradients in p.grad, where DDP leaves them until the pass is over, and their places in the bucket.

        Empty where p.grad is a view of the bucket, and where there was no backward pass: for a rank that has joined.
        """
        if torch._C._current_graph_task_id() < 0:
            return [], []
        pairs = [
            (p.grad, place)
            for p, place in zip(bucket.parameters(), bucket.gradients(), strict=True)
            if p.grad is not None
        ]
        if any(grad.data_ptr() == place.data_ptr() for grad, place in pairs):
            return [], []
        return [grad.detach() for grad, _ in pairs], [place for _, place in pairs]


class FilteredApart:
    """scope="group": every bucket decides for itself, while the next one is on its way in."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle = handle
        self.under_way: list[tuple[Exchange, list[Any], Tensor, Future]] = []
        self.make = partial(Exchange, exchange.group, exchange.micro_group)

    def take(self, bucket: GradBucket, first: bool, last: bool) -> Future:
        if first:
            self.handle.begin()
            self.under_way, self.number = [], 0
        self.number += 1
        exchange, future = self.make(tag=self.number), future_on(bucket.buffer())
        exchange.send(bucket.buffer())
        self.under_way.append((exchange, bucket.parameters(), bucket.buffer(), future))
        while len(self.under_way) > (0 if last else 1):
            self._settle(*self.under_way.pop(0))
        if last:
            self.handle.end()
        return future

    def _settle(self, exchange: Exchange, params: list[Any], flat: Tensor, future: Future) -> None:
        self.handle.settle(exchange, params, [exchange.group])
        future.set_result(flat)


class Averaged:
    """Plain averaging, bit for bit as without a hook: multiplied by 1/W, then added up."""

    def __init__(self, handle: Handle | None, exchange: Exchange) -> None:
        self.handle, self.group = handle, exchange.group

    # collectives have futures of another class
    def take(self, bucket: GradBucket, first: bool, last: bool) -> Any:
        if self.handle is not None:
            if first:
                self.handle.begin()
                self.params: list[Any] = []
            self.params += bucket.parameters()
            if last:
                self.handle.averaged(self.params)
                self.handle.end()
        flat = bucket.buffer().mul_(1 / dist.get_world_size(self.group))
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


Way = Averaged | Filtered | FilteredApart


class Hook:
    """The one communication hook of a model. DDP cannot take it off; what it does can be changed.

    The policy says at the first bucket which way a step goes, so that it may be exchanged between steps.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.seen: set[Tensor] = set()  # parameters of this pass's buckets so far
        self.count = sum(p.requires_grad for p in model._module_parameters)
        self.wide = all(
            p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.requires_grad
        )
        self.handle: Handle | None = None
        self.exchange: Exchange
        self.policy: Policy | None = None
        self.way: Way | None = None

    def run(self, state: object, bucket: GradBucket):  # type: ignore[no-untyped-def]  # DDP knows one annotation, not Averaged's
        if bucket.buffer().is_sparse:
            raise TypeError(
                "attach: gradients must be dense; a bucket's is sparse. Use nn.Embedding(..., sparse=False)."
            )
        first, last = self.place(bucket)
        if first:
            policy = None if self.handle is None else self.handle.policy
            if self.way is None or policy is not self.policy:
                self.policy, self.way = policy, self.choose(policy)
        assert self.way is not None
        return self.way.take(bucket, first, last)

    def place(self, bucket: GradBucket) -> tuple[bool, bool]:
        """Whether a bucket is the first and the last of its pass. In a static graph's first pass all say that they are number 0."""
        params = bucket.parameters()
        if not self.seen.isdisjoint(params):  # the pass before broke off
            self.seen = set()
        first = not self.seen
        self.seen.update(params)
        last = bucket.is_last() or len(self.seen) == self.count
        if last:
            self.seen = set()
        return first, last

    def choose(self, policy: Policy | None) -> Way:
        if self.handle is None or policy is None or averages(policy):
            return Averaged(self.handle, self.exchange)
        if getattr(policy, "scope", "all") == "group":
            return FilteredApart(self.handle, self.exchange)
        pair = (
            type(policy) is GAF
            and policy.min_accepted == 2
            and self.exchange.W == self.exchange.k == 2
        )
        return Filtered(
            self.handle, Pair(self.exchange.group) if pair and self.wide else self.exchange
        )


def averages(policy: Policy) -> bool:
    """Whether every row counts whatever the Gram matrix says."""
    return isinstance(policy, Mean) and type(policy).__call__ is Sequential.__call__


_hooks: WeakKeyDictionary[DistributedDataParallel, Hook] = WeakKeyDictionary()


def is_attached(model: DistributedDataParallel) -> bool:
    return model in _hooks and _hooks[model].handle is not None


def has_other_hook(model: DistributedDataParallel) -> bool:
    return model not in _hooks and bool(model._comm_hooks)


def install(model: DistributedDataParallel, handle: Handle, exchange: Exchange) -> None:
    """Has the handle decide on the model's gradients, until it is detached."""
    hook = _hooks.get(model)
    if hook is None:
        hook = Hook(model)
        model.register_comm_hook(None, hook.run)
        _hooks[model] = hook
    hook.handle, hook.exchange, hook.way = handle, exchange, None
    handle.on_detach(partial(take_off, hook))
    for p in model.parameters():
        # each tells of what it holds before a backward pass adds to it; the first is listened to
        if p.requires_grad:
            handle.on_detach(
                p.register_hook(lambda grad, p=p: handle.before_accumulation(p.grad)).remove
            )


def take_off(hook: Hook) -> None:
    hook.handle = hook.way = None


def future_on(tensor: Tensor) -> Future:
    """A future that a CUDA tensor may be the result of: it carries the streams' order along."""
    return torch.futures.Future(devices=[tensor.device] if tensor.device.type == "cuda" else None)
