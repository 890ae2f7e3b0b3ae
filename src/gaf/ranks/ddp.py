"""DistributedDataParallel: the communication hook by which a handle decides on its buckets."""

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gaf.ranks.buckets import bucket_parameters, in_backward
from gaf.ranks.ddp_ways import PlainAverage, Way, choose_way
from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.ranks.model_checks import raise_thawed
from gaf.rules.contract import Policy


class BucketHook:
    """The one communication hook of a model. DDP cannot remove it; what it does can be changed.

    The policy chooses the way of a step at the first bucket, so it may be exchanged between steps.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model, self.group = ref(model), model.process_group
        self.params = bucket_parameters(model)
        self.seen: set[Tensor] = set()  # parameters of this pass's buckets so far
        self.unwatched = list(self.params)
        # where gradients lay when this pass reached them
        self.pointers: dict[Tensor, int] = {}
        self.handle: Handle | None = None
        self.exchange: Exchange | None = None
        self.policy: Policy | None = None
        self.way: Way | None = None

    # Not annotated: DDP accepts only Future[Tensor], and PlainAverage returns another class.
    def run(self, state: object, bucket: GradBucket):  # type: ignore[no-untyped-def]
        if bucket.buffer().is_sparse:
            raise TypeError(
                "attach: gradients must be dense; a bucket's is sparse. "
                "Use nn.Embedding(..., sparse=False)."
            )
        first, last = self.position(bucket)
        if first:
            self.prepare()
            ranks = self.begin()
            assert self.way is not None
            self.way.begin(ranks)
        assert self.way is not None
        future = self.way.take(bucket, last)
        if last:
            self.pointers.clear()
        return future

    def position(self, bucket: GradBucket) -> tuple[bool, bool]:
        """Whether a bucket is the first and the last of its pass.

        In the first pass of a static graph every bucket reports index 0, so buckets are recognised
        by their parameters.
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
        """Chooses a way anew after a change of policy, and watches parameters that were thawed."""
        if self.unwatched:
            self.watch()
        policy = None if self.handle is None else self.handle.policy
        if self.way is None or policy is not self.policy:
            self.policy = policy
            self.way = self.choose_way(policy)

    def begin(self) -> int:
        """Begins a pass; returns how many ranks DDP averages over."""
        model, world = self.model(), dist.get_world_size(self.group)
        joining = model is not None and model._join_config.enable
        by_active = joining and model is not None and not model._divide_by_initial_world_size
        if self.handle is not None:
            found = self.handle.begin(joining, joined=not in_backward())
            return found if by_active else world
        return count_active_ranks(self.params[0], self.group) if by_active else world

    def choose_way(self, policy: Policy | None) -> Way:
        plain = PlainAverage(self.handle, self.group, self.params, self.pointers)
        if self.handle is None or self.exchange is None or policy is None:
            return plain
        return choose_way(self.handle, self.exchange, policy, plain)

    def watch(self) -> None:
        """Has every trainable parameter report what its gradient holds before a pass adds to it.

        At the node that adds: a hook on the parameter would run in torch.autograd.grad too.
        """
        if self.handle is None:
            return
        trainable = [p for p in self.unwatched if p.requires_grad]
        self.unwatched = [p for p in self.unwatched if not p.requires_grad]
        for p in trainable:
            node = torch.autograd.graph.get_gradient_edge(p).node
            hook = node.register_prehook(partial(report_arrival, self.handle, self.pointers, p))
            self.handle.on_detach(hook.remove)

    def release(self) -> None:
        """Leaves the model to DDP's own average."""
        self.handle = self.exchange = self.way = None


def report_arrival(handle: Handle, pointers: dict[Tensor, int], p: Tensor, grads: Any) -> None:
    """Before a backward pass adds to a parameter's gradient."""
    handle.arrive(p)
    pointers[p] = 0 if p.grad is None else p.grad.data_ptr()


def count_active_ranks(like: Tensor, group: dist.ProcessGroup) -> int:
    """Ranks that are in a backward pass: all but those that have joined."""
    here = torch.tensor(float(in_backward()), device=like.device)
    dist.all_reduce(here, group=group)
    return int(here)


class NoCopies(list[Any]):
    """A model's communication hooks, which its copies do not have: they are not attached."""

    def __reduce__(self) -> Any:
        return list, ()


_hooks: WeakKeyDictionary[DistributedDataParallel, BucketHook] = WeakKeyDictionary()


def hook_of(model: DistributedDataParallel) -> BucketHook:
    """The model's own; DDP calls it once it is registered."""
    if model not in _hooks:
        _hooks[model] = BucketHook(model)
    return _hooks[model]


def has_other_hook(model: DistributedDataParallel) -> bool:
    hooks = [getattr(hook, "__self__", None) for hook, _ in model._comm_hooks]
    return any(not isinstance(hook, BucketHook) for hook in hooks)


def averaged_parameters(model: DistributedDataParallel) -> list[Tensor]:
    """Those that take part in the decision.

    Raises:
        ValueError: for a trainable parameter that DDP does not average, because it was frozen when
            the model was wrapped.
    """
    params = hook_of(model).params
    averaged, ignored = set(params), model.parameters_to_ignore
    for name, p in model.module.named_parameters():
        if p.requires_grad and name not in ignored and p not in averaged:
            raise_thawed(name)
    return params


def install_in_ddp(
    model: DistributedDataParallel,
    handle: Handle,
    exchange: Exchange,
    shards: Sequence[dist.ProcessGroup],
) -> None:
    """Has the handle decide on the model's gradients, until it is detached."""
    hook = hook_of(model)
    if not model._comm_hooks:
        model.register_comm_hook(None, hook.run)
        model._comm_hooks = NoCopies(model._comm_hooks)
    hook.handle, hook.exchange, hook.way = handle, exchange, None
    hook.unwatched = list(hook.params)
    handle.summed_groups = [exchange.group, *shards]
    handle.on_detach(hook.release)
    hook.watch()
    inside, ignored = set(hook.params), model.parameters_to_ignore
    named = model.module.named_parameters()
    handle.outside = {p: n for n, p in named if p not in inside and n not in ignored}
