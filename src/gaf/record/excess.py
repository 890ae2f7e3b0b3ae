"""A score for each of n items, from the values of the micro-batches that held it."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from gaf.arguments import whole_number
from gaf.record.recent import WINDOW
from gaf.shapes import Float64


class Excess:
    """Scores n items.

    An item's score is the average, over the micro-batches that contained it, of a value less the
    average of that value over the last 100 steps. Subtracting the recent average removes drift,
    such as distances that grow as training goes on, so items seen early and late are comparable.

    Args:
        n: number of items, at least 1; they are numbered from 0.

    Attributes:
        sums: (n,) float64, the excess added up.
        counts: (n,) float64, how many were added up. Both may be added up over ranks that recorded
            different micro-batches.
    """

    def __init__(self, n: int) -> None:
        n = whole_number("Audit: n", n, 1, "It is the number of samples, or of shards.")
        self.sums, self.counts = torch.zeros(2, n, dtype=torch.float64, device="cpu").unbind()
        # of each step: sum and number of its values
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def add(
        self, members: Sequence[Tensor | Sequence[int]] | Tensor, values: Sequence[float]
    ) -> None:
        """Adds one step.

        Args:
            members: k integer tensors or lists of any length, or one tensor of k rows: the items in
                each micro-batch, as often as they are in it. An empty one if they are not known
                here, as those of other ranks.
            values: k numbers; NaN counts for nothing.

        Raises:
            ValueError: if there are not k of them, or an item has no number in [0, n); then nothing
                was added.
        """
        places = [places_of(items, len(self.sums)) for items in list_of(members)]
        if len(places) != len(values):
            raise ValueError(
                f"Audit: there must be members for each of the {len(values)} micro-gradients that "
                f"were measured; got {len(places)}. "
                "Give an empty tensor for a micro-batch whose members are not known here."
            )
        usual = self._recent_average(values)
        for where, value in zip(places, values, strict=True):
            if len(where) and not math.isnan(value):
                excess = torch.full(where.shape, value - usual, dtype=torch.float64, device="cpu")
                self.sums.index_add_(0, where, excess)
                self.counts.index_add_(0, where, torch.ones_like(excess))

    def _recent_average(self, values: Sequence[float]) -> float:
        """Over the last 100 steps, the one with these values included."""
        known = [value for value in values if not math.isnan(value)]
        self._recent.append((sum(known), len(known)))
        total = sum(step for step, _ in self._recent)
        return total / max(sum(number for _, number in self._recent), 1)

    def scores(self) -> Float64[Tensor, " n"]:
        """(n,) float64; NaN for an item that was never seen."""
        return self.sums / self.counts

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self.sums.clone(),
            "counts": self.counts.clone(),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict()` gave.

        Raises:
            ValueError: if it is of another number of items.
        """
        if not isinstance(state, dict) or not {"sums", "counts", "recent"} <= state.keys():
            raise ValueError(
                f"Audit: the state must hold sums, counts and recent; got {state!r}. "
                "Give what state_dict() gave."
            )
        if len(state["sums"]) != len(self.sums):
            raise ValueError(
                f"Audit: the state must be of {len(self.sums)} items; got {len(state['sums'])}. "
                "Give the n that was saved."
            )
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self._recent = deque(state["recent"], maxlen=WINDOW)


def list_of(members: Any) -> list[Any]:
    """The members of each micro-batch."""
    try:
        return list(members)
    except TypeError as error:
        raise ValueError(
            "Audit: members must be k integer tensors or lists, or one tensor of k rows; "
            f"got {members!r}. Give the items of each micro-batch."
        ) from error


def places_of(items: Any, n: int) -> Tensor:
    """The items as indices in [0, n), (m,) int64 on the CPU."""
    try:
        where = items if isinstance(items, Tensor) else torch.as_tensor(items, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise_not_whole(repr(items), error)
    where = where.detach().cpu().flatten()
    if not len(where):
        return where.long()
    if where.dtype.is_floating_point or where.dtype.is_complex or where.dtype == torch.bool:
        raise_not_whole(str(where.dtype))
    where = where.long()
    if where.min() < 0 or where.max() >= n:
        raise ValueError(
            f"Audit: members must lie in [0, {n}); got {span(where)}. Give the n of the data set."
        )
    return where


def raise_not_whole(seen: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(
        f"Audit: members must be whole numbers; got {seen}. Give the items' numbers, from 0 on."
    ) from cause


def span(where: Tensor) -> str:
    low, high = int(where.min()), int(where.max())
    return f"{low}" if low == high else f"{low} to {high}"
