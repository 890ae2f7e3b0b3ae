"""All-to-all in, all-gather out: the k rows of a Gram matrix at the bytes of one all-reduce.

A ring all-reduce of n coordinates is a reduce-scatter and an all-gather: each rank sends 2 n (W-1)/W coordinates. The
reduce-scatter adds up what it carries. An all-to-all carries the same bytes and adds nothing: rank r then holds all W
values of its n/W coordinates, which is a slice of every row.

    in:   all-to-all         n (W-1)/W      rank r holds  G[:, slice r]                       (W, n/W)
    K  =  sum over r of      k k scalars    G[:, slice r] G[:, slice r]^T, added in rank order
    out:  all-gather         n (W-1)/W      w^T G[:, slice r]  from every r

The slices are one gradient-sized buffer, the only one. Flat pieces of the gradient (a bucket, a parameter's shard) are
sent as they come to be, so that the way in runs during the backward pass. What a piece leaves over when it is cut into
W equal slices is joined with the other pieces' leftovers into a last small piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.rules.gram import CHUNK, HALF, inner_products, quick_gram, quick_products
from gaf.shapes import Float64

# coordinates below which a piece is joined with others: a message costs more than a copy
SMALL = 2**14
TAG = 2**20  # of the first message between gloo processes; a user's own are numbered lower
# ranks up to which every rank adds up all partial Gram matrices; beyond, each adds a block of entries
FEW = 32

# torch 2.13's name
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


@dataclass(eq=False)
class Parcel:
    """A flat piece of the gradient under way."""

    whole: Tensor  # (W c,), this rank's values; later the update
    slices: Tensor  # (W, c), every rank's values of this rank's slice
    # (k, c): the first of each micro-group, which takes the group's average
    rows: Tensor
    works: list[Any]


class Spare:
    """Memory of the step before: fresh memory costs a CPU a page fault for every 4 KiB."""

    def __init__(self, flats: Sequence[Tensor] = ()) -> None:
        self.flats = list(flats)

    def like(self, flat: Tensor) -> Tensor:
        """Of the same size and kind: one that is spare, or the head of a longer one (DDP cuts its buckets anew after a while)."""
        fit = [
            one
            for one in self.flats
            if one.numel() >= flat.numel() and one.dtype == flat.dtype and one.device == flat.device
        ]
        if not fit:
            return torch.empty_like(flat)
        best = min(fit, key=len)
        self.flats = [one for one in self.flats if one is not best]
        if len(best) > len(flat):
            self.flats.append(best[len(flat) :])
        return best[: len(flat)]


class Exchange:
    """One step's way in and out among the ranks of a group.

    Args:
        group: the W ranks whose gradients are compared.
        micro_group: m consecutive ranks whose average is one row; k = W / m.
        tag: that no other exchange uses whose messages are under way at the same time.
    """

    def __init__(self, group: "dist.ProcessGroup", micro_group: int = 1, tag: int = 0) -> None:
        self.group, self.micro_group, self.tag = group, micro_group, TAG + 2**16 * tag
        self.W = dist.get_world_size(group)
        self.k = self.W // micro_group
        self.device = torch.device("cpu")  # of what is sent
        self.parcels: list[Parcel] = []
        self.rests: list[Tensor] = []  # too small to cut, or left over from cutting
        # a parcel of rests, and where they belong
        self.returns: list[tuple[Tensor, list[Tensor]]] = []
        self._spare = Spare()

    def begin(self) -> None:
        """A new step; forgets one that broke off."""
        self.parcels, self.rests, self.returns = [], [], []

    def send(self, flat: Tensor) -> None:
        """Starts the all-to-all of one piece; `flat` will hold its part of the update in the end."""
        self.device = flat.device
        c, rest = divmod(flat.numel(), self.W)
        if flat.numel() < SMALL:
            c, rest = 0, flat.numel()
        if c:
            self._post(flat[: c * self.W])
        if rest:
            self.rests.append(flat[c * self.W :])

    def _post(self, whole: Tensor) -> None:
        slices = self._spare.like(whole).view(self.W, -1)
        works = all_to_all(
            slices, whole.view(self.W, -1), self.group, self.tag + 2 * len(self.parcels)
        )
        self.parcels.append(Parcel(whole, slices, slices[:: self.micro_group], works))

    def receive(self) -> None:
        """Sends the leftovers, waits for everything, and averages within micro-groups."""
        for dtype in dict.fromkeys(rest.dtype for rest in self.rests):
            rests = [rest for rest in self.rests if rest.dtype == dtype]
            joined = torch.cat([*rests, rests[0].new_zeros(-sum(map(len, rests)) % self.W)])
            self.returns.append((joined, rests))
            self._post(joined)
        self._wait()
        if self.micro_group > 1:
            for parcel in self.parcels:
                for members in parcel.slices.split(self.micro_group):
                    members[0].copy_(members.mean(0, dtype=wide(members.dtype)))

    def _wait(self) -> None:
        for parcel in self.parcels:
            for work in parcel.works:
                work.wait()

    def partial(self) -> Float64[Tensor, "k k"]:
        """This rank's share of K, over its slice of the coordinates: to be added up over the ranks."""
        total = torch.zeros(self.k, self.k, dtype=torch.float64, device=self.device)
        for parcel in self.parcels:
            total += quick_gram(parcel.rows)
        return total

    def gram(self, total: Float64[Tensor, "k k"]) -> Float64[Tensor, "k k"]:
        """K from the sum of all ranks' shares."""
        return total

    def give_back(self, weights: Sequence[float]) -> None:
        """w^T G on every rank, in the places that the pieces came from."""
        for i, parcel in enumerate(self.parcels):
            places = parcel.whole.view(self.W, -1)
            combine(parcel.rows, weights, out=places[dist.get_rank(self.group)])
            parcel.works = all_gather(places, self.group, self.tag + 2 * i + 1)
        self._wait()
        for joined, rests in self.returns:
            for rest, update in zip(
                rests,
                joined.split([*map(len, rests), len(joined) - sum(map(len, rests))]),
                strict=False,
            ):
                rest.copy_(update)

    def fill(self, value: float) -> None:
        """The same number everywhere in place of an update: nothing needs to be sent."""
        for parcel in self.parcels:
            parcel.whole.fill_(value)
        for rest in self.rests:
            rest.fill_(value)

    def end(self) -> None:
        """Keeps the memory for the next step."""
        self._spare = Spare([parcel.slices.view(-1) for parcel in self.parcels])
        self.begin()


class Pair(Exchange):
    """Two ranks' shorter way: an all-reduce of the sum S, all of it during the backward pass but a few inner products.

        |g_0|^2, |g_1|^2        each from its rank
        <g_0, g_1>  =  <g, S> - |g|^2        g: the shorter of the two, of which its rank has kept a copy

    From the shorter one, for nothing cancels there: (|S|^2 - |g_0|^2 - |g_1|^2) / 2 would lose a short row in the rounding
    of a long one. The outcome must be the mean of both or a skip, and S must keep its terms' digits: for policies that
    need two rows, and gradients of float32 or wider.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        super().__init__(group)
        # own tensors, and where the same coordinates of S lie
        self.kept: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []

    def begin(self) -> None:
        super().begin()
        self.kept = []

    def send(self, flat: Tensor, own: Sequence[Tensor] = (), places: Sequence[Tensor] = ()) -> None:
        """Args: own: the values of `flat` where they stay as they are meanwhile; without them a copy is made. places: in flat."""
        slices = flat.new_empty(0) if own else self._spare.like(flat).copy_(flat)
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        self.parcels.append(Parcel(flat, slices, slices, [work]))
        self.kept.append((own, places) if own else ([slices], [flat]))
        self.device = flat.device

    def receive(self) -> None:
        self._wait()

    def partial(self) -> Float64[Tensor, "k k"]:
        """In this rank's row: |g|^2 and <g, S>."""
        known = torch.zeros(2, 2, dtype=torch.float64, device=self.device)
        for own, places in self.kept:
            known[dist.get_rank(self.group)] += with_sum(own, places)
        return known

    def gram(self, total: Float64[Tensor, "k k"]) -> Float64[Tensor, "k k"]:
        (a, a_with_sum), (b, b_with_sum) = total
        between = a_with_sum - a if a <= b else b_with_sum - b
        return torch.stack([a, between, between, b]).view(2, 2)

    def give_back(self, weights: Sequence[float]) -> None:
        for parcel in self.parcels:
            parcel.whole.mul_(weights[0])


def with_sum(own: Sequence[Tensor], total: Sequence[Tensor]) -> Float64[Tensor, " 2"]:
    """|g|^2 and <g, S> of one piece, each a tensor per parameter."""
    if own[0].device.type != "cpu":
        return inner_products([own, total], [(0, 0), (0, 1)]).to(own[0].device)
    found = [quick_products(s, g, CHUNK) for s, g in zip(total, own, strict=True)]
    return torch.tensor(
        [sum(norm2 for _, norm2 in found), sum(inner for inner, _ in found)], dtype=torch.float64
    )


def all_to_all(slices: Tensor, places: Tensor, group: "dist.ProcessGroup", tag: int) -> list[Any]:
    """Starts: slices[r] <- rank r's places[this rank]. (W, c) each."""
    if not by_hand(group, places):
        return [
            dist.all_to_all_single(slices.view(-1), places.view(-1), group=group, async_op=True)
        ]
    me = dist.get_rank(group)
    works = messages([(slices[r], places[r], r) for r in range(len(places))], group, tag)
    slices[me].copy_(places[me])
    return works


def all_gather(places: Tensor, group: "dist.ProcessGroup", tag: int) -> list[Any]:
    """Starts: places[r] <- rank r's places[r]. (W, c)."""
    me = dist.get_rank(group)
    if not by_hand(group, places):
        return [_all_gather(places.view(-1), places[me], group=group, async_op=True)]
    return messages([(places[r], places[me], r) for r in range(len(places))], group, tag)


def by_hand(group: "dist.ProcessGroup", tensor: Tensor) -> bool:
    """Over a slow link gloo's own all-to-all takes longer than messages whose receivers stand ready (docs/cost.md has figures)."""
    return dist.get_backend(group) == "gloo" and tensor.device.type == "cpu"


def messages(
    pairs: list[tuple[Tensor, Tensor, int]], group: "dist.ProcessGroup", tag: int
) -> list[Any]:
    """Receives the first of each pair from the rank that it names, and sends it the second; the nearest neighbour first."""
    me = dist.get_rank(group)
    before, after = (
        [pairs[me - d] for d in range(1, len(pairs))],
        [pairs[(me + d) % len(pairs)] for d in range(1, len(pairs))],
    )
    receiving = [dist.irecv(into, group=group, group_src=r, tag=tag) for into, _, r in before]
    return receiving + [dist.isend(out, group=group, group_dst=r, tag=tag) for _, out, r in after]


def combine(rows: Tensor, weights: Sequence[float], out: Tensor) -> None:
    """out <- w^T G of a slice, (c,) from (k, c); rows of weight zero are not touched: 0 x NaN is NaN."""
    used: list[tuple[Tensor, float]] = [(row, w) for row, w in zip(rows, weights, strict=True) if w]
    if not used:
        out.zero_()
        return
    (first, w), *others = used
    exact = wide(out.dtype)
    total = torch.mul(first, w, out=out) if out.dtype == exact else first.to(exact).mul_(w)
    for row, w in others:
        total.add_(row, alpha=w)
    if total is not out:
        out.copy_(total)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def add_in_rank_order(partial: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum over ranks, the same bits on each, on the host: the one look that a step takes at its decision.

    Args:
        partial: (p,) float64, this rank's share.
        group: the ranks to add over.
    """
    W, p = dist.get_world_size(group), partial.numel()
    if W <= FEW:
        shares = partial.new_empty(W, p)
        _all_gather(shares.view(-1), partial, group=group)
        return summed(shares.cpu())
    padded = torch.cat([partial, partial.new_zeros(-p % W)])
    shares = torch.empty_like(padded).view(W, -1)
    dist.all_to_all_single(shares.view(-1), padded, group=group)
    _all_gather(padded, summed(shares), group=group)
    return padded[:p].cpu()


def summed(shares: Tensor) -> Tensor:
    total: Tensor = shares[0].clone()
    for share in shares[1:]:
        total += share
    return total
