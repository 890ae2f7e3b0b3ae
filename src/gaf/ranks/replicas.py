"""HSDP: one decision over the replicas of a sharded model, on the shards of their gradients."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from gaf.ranks.arrival_hooks import ArrivalHooks
from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.ranks.metric import moments_for
from gaf.ranks.way_in import WayIn
from gaf.rules.averaging import averages, measures_next


class Replicas:
    """Compares the replicas' gradients: sends them during the backward pass, decides at its end.

    Each rank holds a shard; the ranks of `group` hold the same shard of different replicas. The
    Gram matrix is added up over the replicas' slices and then over the shards.

    Args:
        reduced: the parameters, as FSDP2 groups them.
        groups: those over which the coordinates are spread: FSDP2's own first.
    """

    def __init__(
        self,
        handle: Handle,
        exchange: Exchange,
        params: list[nn.Parameter],
        reduced: list[list[nn.Parameter]],
        groups: Sequence[dist.ProcessGroup],
    ) -> None:
        self.handle, self.exchange = handle, exchange
        self.summed_groups = handle.summed_groups = [exchange.group, *groups]
        self.way_in = WayIn(exchange, params, reduced)
        self.hooks = ArrivalHooks(handle, params, self.way_in.arrive)

    def begin(self) -> None:
        """A backward pass has begun. It may be one that reaches no parameter."""
        self.hooks.place()
        self.way_in.begin(moments_for(self.handle))

    @torch.no_grad()
    def end(self) -> None:
        """The backward pass is over: decides on what it has reached."""
        if not self.way_in.arrived:
            return
        used = self.way_in.agree()
        self.handle.stale.reach(used)
        self.handle.begin()
        self.way_in.finish(used)
        policy = self.handle.policy
        if averages(policy) and not measures_next(policy) and self.handle.scaler is None:
            self._average(used)
        else:
            self.handle.settle(self.exchange, used, self.summed_groups)
        self.handle.end()

    def _average(self, used: list[nn.Parameter]) -> None:
        """The same average as after a measurement, to the bit."""
        self.exchange.receive()
        if self.handle.decide_unseen(used):
            self.exchange.give_back([1 / self.exchange.k] * self.exchange.k)
        else:
            self.exchange.fill(0.0)
        self.exchange.end()
