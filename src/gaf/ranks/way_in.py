"""The way in of a sharded model's gradients, while the backward pass is still running.

Ranks must begin the collectives of a group in the same order, but their passes may reach parameters
in different orders, and one of them may leave parameters out. So they agree on an order:

    during the pass   what both of the last two passes used is sent in the order agreed on, as soon
                      as a parameter group is complete: a hook may change its neighbours' gradients;
                      what comes early waits for those before it
    agree             sends the rest of that order, zeros for what this rank has not reached; then
                      the ranks tell each other which parameters they have reached, and when
    finish            sends what else was used, and again what has changed since it was sent

Thus every rank begins the same collectives in the same order, whatever its own pass has reached.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf.ranks.exchange import Exchange, Parcel
from gaf.ranks.metric import ShardPiece
from gaf.rules.second_moments import SecondMoments


class Sent(NamedTuple):
    """A parameter's gradient, and what the exchange has made of it."""

    grad: Any
    version: int  # counts changes of the gradient
    parcels: list[Parcel]
    rests: list[Tensor]


class WayIn:
    """Sends the gradients of each pass.

    Args:
        groups: the parameters that FSDP2 reduces together.

    Attributes:
        order: the parameters that are sent during the pass, the same on all ranks.
        arrived: the place, from 1 on, of each parameter that the pass has reached on this rank.
    """

    def __init__(
        self, exchange: Exchange, params: list[nn.Parameter], groups: list[list[nn.Parameter]]
    ) -> None:
        self.exchange, self.params = exchange, params
        self._group_of: dict[Tensor, int] = {p: i for i, group in enumerate(groups) for p in group}
        self._missing: dict[int, set[Tensor]] = {}  # of the order, by group: not arrived so far
        self.order: list[nn.Parameter] = []
        self.arrived: dict[Tensor, int] = {}
        self._used: set[Tensor] = set()  # by any rank, in the last pass
        self._sent: dict[Tensor, Sent] = {}
        self.moments: SecondMoments | None = None
        self._told = True  # whether the ranks have told each other what this pass has reached
        self._changed: set[Tensor] = set()  # parameters to send again, on any rank's account

    def begin(self, moments: SecondMoments | None = None) -> None:
        """Begins a pass; completes what one that an exception has ended had begun to send.

        moments: the optimizer's, for its metric; None for the plain one.
        """
        self.arrived = {}
        if self._sent and not self._told:
            self._tell(whole=False)
        self.moments = moments
        self.order = [p for p in self.order if p.requires_grad]
        self._missing = {self._group_of[p]: set() for p in self.order}
        for p in self.order:
            self._missing[self._group_of[p]].add(p)
        self._restart()

    def _restart(self) -> None:
        self.exchange.keep([], [])
        self.exchange.begin()
        self._sent, self._told = {}, False

    @torch.no_grad()
    def arrive(self, p: Tensor) -> None:
        """FSDP2 has reduced a gradient, and has added it to what was there.

        Raises:
            RuntimeError: if no pass has begun.
        """
        if self._told:
            raise RuntimeError(
                "attach: FSDP2 must begin a backward pass before it reduces gradients; it takes "
                "one that an exception ended to be still running. "
                "Call model.reset_iter_state() after such an exception."
            )
        self.arrived.setdefault(p, len(self.arrived) + 1)
        self._missing.get(self._group_of[p], set()).discard(p)
        for following in self.order[len(self._sent) :]:
            if self._missing[self._group_of[following]]:
                break
            self._send(following)

    def agree(self) -> list[nn.Parameter]:
        """Sends the rest of the order; returns the parameters that any rank's pass has reached."""
        while (places := self._tell(whole=True)) is None:
            self._restart()  # another rank's pass broke off; its next one takes the place of it
        used = list(places)
        steady = [p for p in used if p in self._used and not is_offloaded(p)]
        self.order = sorted(steady, key=lambda p: places[p])
        self._used = set(used)
        return used

    def finish(self, used: list[nn.Parameter]) -> None:
        """Sends what is missing. What was sent is then in the order of the model's parameters."""
        self._sent = {p: self._sent[p] for p in used if p in self._sent and p not in self._changed}
        self._keep_sent(used)
        for p in used:
            if p not in self._sent:
                self._send(p)
            if p not in self.arrived:
                p.grad = self._sent[p].grad
        self._keep_sent(used)
        self._sent = {}  # the gradients are the model's alone

    def _keep_sent(self, used: list[nn.Parameter]) -> None:
        pieces = [self._sent[p] for p in used if p in self._sent]
        parcels = [parcel for piece in pieces for parcel in piece.parcels]
        self.exchange.keep(parcels, [rest for piece in pieces for rest in piece.rests])

    def _send(self, p: Tensor) -> None:
        grad: Any = p.grad if p in self.arrived else torch.zeros_like(p)
        parcels, rests = len(self.exchange.parcels), len(self.exchange.rests)
        flat = grad.to_local().view(-1)
        self.exchange.send(flat, ShardPiece(flat, p, self.moments))
        made = self.exchange.parcels[parcels:], self.exchange.rests[rests:]
        self._sent[p] = Sent(grad, local_part(grad)._version, *made)

    def _tell(self, whole: bool) -> dict[nn.Parameter, int] | None:
        """Sends the rest of the order, then asks what the others have reached.

        Args:
            whole: whether this rank finished its pass.

        Returns:
            For each parameter that was reached, in the model's order, the latest place on any rank;
            None if some rank did not finish its pass.
        """
        for p in self.order[len(self._sent) :]:
            self._send(p)
        params = [p for p in self.params if p.requires_grad]
        reached = [self.arrived.get(p, 0) for p in params]
        changed = [whole and self._has_changed(p) for p in params]
        device = local_part(params[0]).device
        told = torch.tensor([not whole, *reached, *changed], dtype=torch.int32, device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.exchange.group)
        self._told = True
        broken, *numbers = told.tolist()
        places, flags = numbers[: len(params)], numbers[len(params) :]
        self._changed = {p for p, flag in zip(params, flags, strict=True) if flag}
        found = {p: place for p, place in zip(params, places, strict=True) if place}
        return None if broken else found

    def _has_changed(self, p: Tensor) -> bool:
        """Whether a gradient that was sent is not what was sent: FSDP2 or a hook has changed it."""
        if p not in self._sent or p not in self.arrived:
            return False
        grad, version, *_ = self._sent[p]
        return p.grad is not grad or local_part(grad)._version != version


def local_part(tensor: Any) -> Tensor:
    """A DTensor's shard on this rank."""
    local: Tensor = tensor._local_tensor
    return local


def is_offloaded(p: Any) -> bool:
    """Whether its gradient's way to the host may not be over when FSDP2 calls the hooks."""
    return bool(local_part(p).device.type != p.device_mesh.device_type)
