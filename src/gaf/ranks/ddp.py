"""DistributedDataParallel: a communication hook that sends each bucket on its way and decides at the last one."""

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gaf.ranks.exchange import Exchange, Pieces
from gaf.ranks.handle import Handle, raise_thawed
from gaf.ranks.pair import Pair
from gaf.rules.contract import Policy, scope_of
from gaf.rules.policies import GAF, averages

Future = torch.futures.Future[Tensor]  # of the bucket, updated
Groups = Sequence[dist.ProcessGroup]
Aside = list[tuple[Tensor, Tensor]]


class Filtered:
    """One decision for all buckets: each is on its way in while the backward pass goes on; the last one decides."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle, self.exchange = handle, exchange
        self.waiting: list[tuple[Future, Tensor]] = []
        self.params: list[Tensor] = []
        self.aside: Aside = []

    def take(self, bucket: GradBucket, first: bool, last: bool) -> Future:
        if first:
            self.exchange.begin()
            self.waiting, self.params, self.aside = [], [], []
        flat, future = bucket.buffer(), future_on(bucket.buffer())
        self.aside += set_aside(bucket, self.handle)
        self.exchange.send(flat, partial(self._kept_by_parameters, bucket))
        self.params += bucket.parameters()
        self.waiting.append((future, flat))
        if last:
            self.handle.settle(self.exchange, self.params, self.handle.over)
            put_back(self.aside)
            self.handle.end()
            for one, update in self.waiting:
                one.set_result(update)
            self.waiting, self.params = [], []  # DDP may free its buckets
        return future

    def _kept_by_parameters(self, bucket: GradBucket) -> Pieces:
        """This rank's gradients in p.grad, where DDP leaves them until the pass is over, and their places in the bucket.

        Empty where p.grad is a view of the bucket, and where there was no backward pass: for a rank that has joined.
        """
        if not in_backward():
            return [], []
        pairs = [
            (p.grad, place_of(p, flat))
            for p, flat in zip(bucket.parameters(), bucket.gradients(), strict=True)
            if p.grad is not None and not self.handle.stale.waits(p)
        ]
        if any(grad.data_ptr() == place.data_ptr() for grad, place in pairs):
            return [], []
        return [grad.detach() for grad, _ in pairs], [place for _, place in pairs]


def set_aside(bucket: GradBucket, handle: Handle) -> Aside:
    """Takes updates of an earlier pass of the same step out of a bucket: DDP copies what a parameter holds, reached or not.

    Returns:
        Places in the bucket, and what is to lie there again after the decision.
    """
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    waiting = [(place, place.clone()) for p, place in pairs if handle.stale.waits(p)]
    for place, _ in waiting:
        place.zero_()
    return waiting


def put_back(aside: Aside) -> None:
    """Adds: where a place held zeros, another rank's pass may have put an update there."""
    for place, update in aside:
        place.add_(update)


def place_of(p: Tensor, place: Tensor) -> Tensor:
    """A parameter's gradient in its bucket, with every coordinate where `p` has it.

    DDP lays a parameter out in the order of its own strides, where these leave no gaps, and shows the memory as if it were
    contiguous.
    """
    if p.is_contiguous() or torch.empty_like(p, device="meta").stride() != p.stride():
        return place
    return place.as_strided(p.shape, p.stride())


class FilteredApart:
    """scope="group": every bucket decides for itself, while the next one is on its way in."""

    def __init__(self, handle: Handle, exchange: Exchange) -> None:
        self.handle = handle
        self.in_progress: list[tuple[Exchange, list[Any], Tensor, Aside, Future]] = []
        self.number = 0
        self.make = partial(Exchange, exchange.group, exchange.micro_group)

    def take(self, bucket: GradBucket, first: bool, last: bool) -> Future:
        if first:
            self.in_progress, self.number = [], 0
        self.number += 1
        flat, exchange = bucket.buffer(), self.make(tag=self.number)
        aside, future = set_aside(bucket, self.handle), future_on(flat)
        exchange.send(flat)
        self.in_progress.append((exchange, bucket.parameters(), flat, aside, future))
        while len(self.in_progress) > (0 if last else 1):
            self._settle(*self.in_progress.pop(0))
        if last:
            self.handle.end()
        return future

    def _settle(
        self, exchange: Exchange, params: list[Any], flat: Tensor, aside: Aside, future: Future
    ) -> None:
        self.handle.settle(exchange, params, [exchange.group])
        put_back(aside)
        future.set_result(flat)


class Averaged:
    """Plain averaging, bit for bit as without a hook: multiplied by 1/W, then added up. A skip sends nothing.

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

    # Collectives have futures of another class.
    def take(self, bucket: GradBucket, first: bool, last: bool) -> Any:
        flat = bucket.buffer()
        if first and self.handle is not None:
            self.steps = self.handle.averaged(self.params)
        if last and self.handle is not None:
            self.handle.end()
        if not self.steps:
            future = future_on(flat)
            future.set_result(flat.zero_())
            return future
        work = dist.all_reduce(flat.mul_(1 / self.ranks), group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def active_ranks(like: Tensor, group: dist.ProcessGroup) -> int:
    """Ranks that are in a backward pass: all but those that have joined."""
    here = torch.tensor(float(in_backward()), device=like.device)
    dist.all_reduce(here, group=group)
    return int(here)


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() >= 0)


Way = Averaged | Filtered | FilteredApart


class Hook:
    """The one communication hook of a model. DDP cannot take it off; what it does can be changed.

    The policy says at the first bucket which way a step goes, so that it may be exchanged between steps.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model, self.group = ref(model), model.process_group
        self.params = bucketed(model)
        self.seen: set[Tensor] = set()  # parameters of this pass's buckets so far
        self.unwatched = list(self.params)
        self.wide = all(p.dtype in (torch.float32, torch.float64) for p in self.params)
        self.handle: Handle | None = None
        self.exchange: Exchange
        self.policy: Policy | None = None
        self.way: Way | None = None

    # DDP knows one annotation, not Averaged's.
    def run(self, state: object, bucket: GradBucket):  # type: ignore[no-untyped-def]
        if bucket.buffer().is_sparse:
            raise TypeError(
                "attach: gradients must be dense; a bucket's is sparse. Use nn.Embedding(..., sparse=False)."
            )
        first, last = self.place(bucket)
        if first:
            self.prepare()
            ranks = self.begin()
            if isinstance(self.way, Averaged):
                self.way.ranks = ranks
        assert self.way is not None
        return self.way.take(bucket, first, last)

    def place(self, bucket: GradBucket) -> tuple[bool, bool]:
        """Whether a bucket is the first and the last of its pass.

        In the first pass of a static graph every bucket reports index 0, so buckets are recognised by their parameters.
        """
        params = bucket.parameters()
        if not self.seen.isdisjoint(params):  # left over from a pass that an exception ended
            self.seen = set()
        first = not self.seen
        self.seen.update(params)
        last = bucket.is_last() or len(self.seen) == len(self.params)
        if last:
            self.seen = set()
        return first, last

    def prepare(self) -> None:
        """Chooses the way of a step anew where the policy is another, and watches parameters that were thawed."""
        if self.unwatched:
            self.watch()
        policy = None if self.handle is None else self.handle.policy
        if self.way is None or policy is not self.policy:
            self.policy = policy
            self.way = self.choose(policy)

    def begin(self) -> int:
        """Begins a pass; returns how many ranks DDP averages over."""
        model, W = self.model(), dist.get_world_size(self.group)
        joining = model is not None and model._join_config.enable
        some = joining and model is not None and not model._divide_by_initial_world_size
        if self.handle is not None:
            active = self.handle.begin(joining, joined=not in_backward())
        elif some:
            active = active_ranks(self.params[0], self.group)
        return active if some else W

    def choose(self, policy: Policy | None) -> Way:
        if self.handle is None or policy is None or averages(policy):
            return Averaged(self.handle, self.group, self.params)
        if scope_of(policy) == "group":
            return FilteredApart(self.handle, self.exchange)
        pair = type(policy) is GAF and policy.min_accepted == 2
        pair = pair and self.exchange.W == self.exchange.k == 2
        exchange = Pair(self.exchange.group) if pair and self.wide else self.exchange
        return Filtered(self.handle, exchange)

    def watch(self) -> None:
        """Has each trainable parameter report what its gradient holds before a backward pass adds to it.

        At the node that adds: a hook on the parameter would run in torch.autograd.grad too.
        """
        if self.handle is None:
            return
        trainable = [p for p in self.unwatched if p.requires_grad]
        self.unwatched = [p for p in self.unwatched if not p.requires_grad]
        for p in trainable:
            node = torch.autograd.graph.get_gradient_edge(p).node
            hook = node.register_prehook(partial(arrive, self.handle, p))
            self.handle.on_detach(hook.remove)


def arrive(handle: Handle, p: Tensor, grads: Any) -> None:
    handle.arrive(p)


def bucketed(model: DistributedDataParallel) -> list[Tensor]:
    """The parameters that DDP averages: those that were trainable when the model was wrapped."""
    return [p for b in model.reducer._get_zeros_like_grad_buckets() for p in b.parameters()]


class NoCopies(list[Any]):
    """A model's communication hooks, which its copies do not have: they are not attached."""

    def __reduce__(self) -> Any:
        return list, ()


_hooks: WeakKeyDictionary[DistributedDataParallel, Hook] = WeakKeyDictionary()


def has_other_hook(model: DistributedDataParallel) -> bool:
    return any(
        not isinstance(getattr(hook, "__self__", None), Hook) for hook, _ in model._comm_hooks
    )


def hook_of(model: DistributedDataParallel) -> Hook:
    """The model's own; DDP calls it once it is registered."""
    if model not in _hooks:
        _hooks[model] = Hook(model)
    return _hooks[model]


def parameters(model: DistributedDataParallel) -> list[Tensor]:
    """Those that take part in the decision.

    Raises:
        ValueError: where a trainable parameter would not be averaged, for it was frozen when the model was wrapped.
    """
    params = hook_of(model).params
    averaged, ignored = set(params), model.parameters_to_ignore
    for name, p in model.module.named_parameters():
        if p.requires_grad and name not in ignored and p not in averaged:
            raise_thawed(name)
    return params


def install(
    model: DistributedDataParallel, handle: Handle, exchange: Exchange, shards: Groups
) -> None:
    """Has the handle decide on the model's gradients, until it is detached."""
    hook = hook_of(model)
    if not model._comm_hooks:
        model.register_comm_hook(None, hook.run)
        model._comm_hooks = NoCopies(model._comm_hooks)
    hook.handle, hook.exchange, hook.way = handle, exchange, None
    hook.unwatched = list(hook.params)
    handle.over = [exchange.group, *shards]
    handle.on_detach(partial(take_off, hook))
    hook.watch()
    held = set(hook.params)
    outside = {p: n for n, p in model.module.named_parameters() if p not in held}
    handle.refuse_gradients(
        {p: n for p, n in outside.items() if n not in model.parameters_to_ignore}
    )


def take_off(hook: Hook) -> None:
    hook.handle = hook.way = None


def future_on(tensor: Tensor) -> Future:
    """A future that a CUDA tensor may be the result of: it carries the streams' order along."""
    return torch.futures.Future(devices=[tensor.device] if tensor.device.type == "cuda" else None)
