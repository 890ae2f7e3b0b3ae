"""All-to-all in, all-gather out: W gradients are compared at the bytes of one all-reduce.

A decision needs only the k x k Gram matrix K = G G^T of the rows, never the rows themselves.

A ring all-reduce of n coordinates is a reduce-scatter and an all-gather, in each of which a rank
sends n (W-1)/W coordinates. The reduce-scatter adds up what it carries. An all-to-all carries the
same bytes and adds nothing: rank r then holds all W values of its n/W coordinates, which is a slice
of every row. The sum over the ranks of the slices' Gram matrices is K.

    method         collective     coordinates    afterwards
    send, receive  all-to-all     n (W-1)/W      rank r holds G[:, slice r], (W, n/W)
    local_products (none)         0              rank r holds G[:, slice r] G[:, slice r]^T
    (the Decider)  all ranks add  k k scalars    every rank holds K and takes the same decision
    give_back      all-gather     n (W-1)/W      every rank holds w^T G[:, slice r] from every r,
                                                 or what a coordinate-wise rule makes of the slice

Together a rank sends 2 n (W-1)/W coordinates, as in the ring all-reduce, and k k scalars.

The slices are one gradient-sized buffer, the only one. Flat pieces of the gradient (a bucket, a
parameter's shard) are sent as soon as they exist, so that the way in runs during the backward pass.
A piece is cut into W equal slices. Its remainder is joined with those of the other pieces into a
last small piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.ranks.messages import TAG, all_gather, all_to_all, first_rank
from gaf.ranks.sent_piece import SentPiece
from gaf.ranks.spare_memory import SpareMemory
from gaf.rules.blas import gram_by_blas
from gaf.rules.combine import combine_into, sum_dtype
from gaf.rules.contract import Merge
from gaf.rules.merging import merge_into
from gaf.rules.row_sums import RowSums
from gaf.shapes import Float64

# coordinates below which a piece is joined with others: a message costs more than a copy
SMALL = 2**14


@dataclass(eq=False)
class Parcel:
    """Coordinates of the gradient in transit, as many for each rank."""

    whole: Tensor  # (W c,), this rank's values; later the update
    slices: Tensor  # (W, c), every rank's values of this rank's slice
    rows: Tensor  # (k, c), the first slice of each micro-group, which takes the group's average
    works: list[Any]
    roots: Tensor | None = None  # (c,), sqrt(M) of a diagonal metric in this rank's slice

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []  # gloo's must not be waited for twice


class Exchange:
    """One step's way in and out among the ranks of a group.

    Args:
        group: the W ranks whose gradients are compared.
        micro_group: m consecutive ranks whose average is one row; k = W / m.
        tag: different from that of any exchange whose messages are in transit at the same time.
    """

    def __init__(self, group: "dist.ProcessGroup", micro_group: int = 1, tag: int = 0) -> None:
        self.group, self.micro_group, self.tag = group, micro_group, TAG + 2**16 * tag
        self.W = dist.get_world_size(group)
        self.k = self.W // micro_group
        self.active = self.W  # ranks that a plain average divides by; fewer if some have joined
        self.device = torch.device("cpu")  # of what is sent
        # of the coordinates: groups of other shards count from elsewhere
        self.origin = first_rank(group) << 40
        self.parcels: list[Parcel] = []
        self.rests: list[Tensor] = []  # pieces too small to cut, and remainders of cutting
        self._roots: dict[Tensor, Tensor | None] = {}  # of the rests
        # each parcel of rests, with the places that they came from
        self.returns: list[tuple[Tensor, list[Tensor]]] = []
        self._posted = 0  # parcels of this step so far
        self._spare = SpareMemory()

    def begin(self) -> None:
        """Begins a step; drops what an interrupted one has left."""
        self.parcels, self.rests, self.returns = [], [], []
        self._roots, self._posted = {}, 0

    def send(self, flat: Tensor, piece: SentPiece | None = None) -> None:
        """Starts the way in of one piece.

        Args:
            flat: this rank's values; in the end it holds its part of the update.
            piece: knows the metric at its coordinates; for `Sums`, what else keeps these values
                during the pass, and how the engine itself would divide them.
        """
        self.device, piece = flat.device, piece or SentPiece(flat)
        c, rest = divmod(flat.numel(), self.W)
        if flat.numel() < SMALL:
            c, rest = 0, flat.numel()
        if c:
            mine = self.group.rank() * c
            self._post(flat[: c * self.W], piece.roots(mine, mine + c))
        if rest:
            self.rests.append(flat[c * self.W :])
            self._roots[self.rests[-1]] = piece.roots(c * self.W, flat.numel())

    def keep(self, parcels: list[Parcel], rests: list[Tensor]) -> None:
        """Drops all but these, and takes them in this order, which is that of sums over pieces."""
        kept = set(parcels)
        for parcel in self.parcels:
            if parcel not in kept:
                parcel.wait()
                self._spare.flats.append(parcel.slices.view(-1))
        self.parcels, self.rests = parcels, rests

    def receive(self) -> None:
        """Sends the rests, waits for everything, and averages within micro-groups."""
        for dtype in dict.fromkeys(rest.dtype for rest in self.rests):
            rests = [rest for rest in self.rests if rest.dtype == dtype]
            joined = torch.cat([*rests, rests[0].new_zeros(-sum(map(len, rests)) % self.W)])
            self.returns.append((joined, rests))
            self._post(joined, self._join_roots(rests, len(joined)))
        self._wait()
        if self.micro_group > 1:
            for parcel in self.parcels:
                for members in parcel.slices.split(self.micro_group):
                    members[0].copy_(members.mean(0, dtype=sum_dtype(members.dtype)))

    def _join_roots(self, rests: list[Tensor], length: int) -> Tensor | None:
        """This rank's slice of the roots of joined rests, which are as long as `length`."""
        known = [root for rest in rests if (root := self._roots.get(rest)) is not None]
        if not known:
            return None
        padding = known[0].new_zeros(length - sum(map(len, rests)))
        return torch.cat([*known, padding]).view(self.W, -1)[self.group.rank()]

    def local_products(self) -> Float64[Tensor, "k k"]:
        """This rank's share of K, over its slice of the coordinates. K is the sum of all shares."""
        total = torch.zeros(self.k, self.k, dtype=torch.float64, device=self.device)
        for parcel in self.parcels:
            total += gram_by_blas(parcel.rows, parcel.roots)
        return total

    def seen_in(self, total: Tensor) -> Tensor | RowSums:
        """What a policy is shown, from the sum of all ranks' `local_products`: here that is K."""
        return total

    def give_back(self, weights: Sequence[float], merge: Merge | None = None) -> None:
        """The update on every rank, in the places that the pieces came from.

        It is w^T G, or what a coordinate-wise rule makes of the rows with a weight.
        """
        me, start = self.group.rank(), self.origin
        for i, parcel in enumerate(self.parcels):
            places = parcel.whole.view(self.W, -1)
            if merge is None:
                combine_into(places[me], parcel.rows, weights)
            else:
                place = start + me * places.shape[1]
                merge_into(places[me], list(parcel.rows), weights, merge, place)
            start += parcel.whole.numel()
            parcel.works = all_gather(places, self.group, self.tag + 2 * i + 1)
        self._wait()
        for joined, rests in self.returns:
            updates = joined[: sum(map(len, rests))].split(list(map(len, rests)))
            for rest, update in zip(rests, updates, strict=True):
                rest.copy_(update)

    def fill(self, value: float) -> None:
        """Writes one number everywhere in place of an update: nothing needs to be sent."""
        for parcel in self.parcels:
            parcel.whole.fill_(value)
        for rest in self.rests:
            rest.fill_(value)

    def end(self) -> None:
        """Keeps the memory for the next step."""
        self._spare = SpareMemory([parcel.slices.view(-1) for parcel in self.parcels])
        self.begin()

    def _post(self, whole: Tensor, roots: Tensor | None = None) -> None:
        places = whole.view(self.W, -1)
        slices = self._spare.take_like(whole).view(self.W, -1)
        works = all_to_all(slices, places, self.group, self.tag + 2 * self._posted)
        self._posted += 1
        self.parcels.append(Parcel(whole, slices, slices[:: self.micro_group], works, roots))

    def _wait(self) -> None:
        for parcel in self.parcels:
            parcel.wait()
