"""DDP's buckets: what travels in one, and what stays out of the decision about it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gaf.ranks.metric import roots_in_bucket
from gaf.ranks.sent_piece import Pieces, SentPiece
from gaf.ranks.stale import StaleGradients
from gaf.rules.second_moments import SecondMoments

Future = torch.futures.Future[Tensor]  # of the bucket, updated


class SentBucket:
    """A bucket that waits for its decision, as DDP waits for its future.

    Updates of an earlier pass of the same step are set aside, if `stale` tells them: DDP copies
    into the bucket whatever a parameter's gradient holds, whether this pass has reached it or not.
    """

    def __init__(self, bucket: GradBucket, stale: StaleGradients | None) -> None:
        self.flat = bucket.buffer()
        self.params: list[Tensor] = bucket.parameters()
        self.future = future_on(self.flat)
        # places in the bucket, and the updates that lay there
        self.aside: list[tuple[Tensor, Tensor]] = []
        if stale is not None:
            pairs = zip(self.params, bucket.gradients(), strict=True)
            self.aside = [(place, place.clone()) for p, place in pairs if stale.holds_old_update(p)]
        for place, _ in self.aside:
            place.zero_()

    def put_back(self) -> None:
        """Adds what was set aside: another rank's pass may have put an update in its place."""
        for place, update in self.aside:
            place.add_(update)

    def release(self) -> None:
        self.future.set_result(self.flat)


class BucketPiece(SentPiece):
    """A bucket that is sent.

    Args:
        pointers: where each parameter's gradient lay when the pass reached it; 0 for none.
        moments: the optimizer's, for its metric; None for the plain one.
    """

    def __init__(
        self,
        bucket: GradBucket,
        stale: StaleGradients | None,
        pointers: dict[Tensor, int],
        moments: SecondMoments | None = None,
    ) -> None:
        super().__init__(bucket.buffer())
        self.moments = moments
        self.params: list[Tensor] = bucket.parameters()
        self.places: list[Tensor] = bucket.gradients()
        self.stale, self.pointers = stale, pointers

    def find_kept(self) -> Pieces:
        """This rank's gradients in p.grad, and their places in the bucket.

        DDP leaves p.grad alone until the pass is over. Empty if p.grad is a view of the bucket, and
        on a rank that has joined, which runs no backward pass.
        """
        if not in_backward():
            return [], []
        own, places = [], []
        for p, flat in zip(self.params, self.places, strict=True):
            if p.grad is not None and not self._holds_old_update(p):
                own.append(p.grad.detach())
                places.append(place_of(p, flat))
        if any(a.data_ptr() == b.data_ptr() for a, b in zip(own, places, strict=True)):
            return [], []
        return own, places

    def roots(self, start: int, stop: int) -> Tensor | None:
        if self.moments is None:
            return None
        return roots_in_bucket(self.moments, self.params, self.flat, start, stop)

    @property
    def is_row(self) -> bool:
        """Whether no update of an earlier pass lies in it."""
        return not any(map(self._holds_old_update, self.params))

    def _holds_old_update(self, p: Tensor) -> bool:
        return self.stale is not None and self.stale.holds_old_update(p)

    def parts(self) -> Iterable[tuple[Tensor, bool]]:
        """DDP divides what was accumulated in the bucket (gradient_as_bucket_view).

        What it copies there without a hook it multiplies by 1 / ranks.
        """
        pairs = zip(self.params, self.places, strict=True)
        there = [self._pointer(p) == place.data_ptr() for p, place in pairs]
        if all(there) or not any(there):
            return [(self.flat, there[0])]
        return zip(self.places, there, strict=True)

    def _pointer(self, p: Tensor) -> int:
        return self.pointers.get(p, 0 if p.grad is None else p.grad.data_ptr())


def place_of(p: Tensor, place: Tensor) -> Tensor:
    """A parameter's gradient in its bucket, with every coordinate where `p` has it.

    DDP lays a parameter out in the order of its own strides, if these leave no gaps, and shows the
    memory as if it were contiguous.
    """
    if p.is_contiguous() or torch.empty_like(p, device="meta").stride() != p.stride():
        return place
    return place.as_strided(p.shape, p.stride())


def bucket_parameters(model: DistributedDataParallel) -> list[Tensor]:
    """The parameters that DDP averages: those that were trainable when the model was wrapped."""
    buckets: list[Any] = model.reducer._get_zeros_like_grad_buckets()
    return [p for bucket in buckets for p in bucket.parameters()]


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() >= 0)


def future_on(tensor: Tensor) -> Future:
    """A future that may hold a CUDA tensor: it carries the order of the streams along."""
    return torch.futures.Future(devices=[tensor.device] if tensor.device.type == "cuda" else None)
