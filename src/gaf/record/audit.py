"""Which samples, or shards, or ranks, were in micro-batches that disagreed with the others: a score for each."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf.arguments import whole_number
from gaf.record.outcome import Outcome
from gaf.record.recent import WINDOW
from gaf.rules.decision import Decision
from gaf.shapes import Float64


class Excess:
    """For each of n items the mean, over the micro-batches that held it, of a value less that value's mean over the last 100 steps.

    What changes as training goes on, such as distances that grow, is thereby taken out; so an item seen early and one seen late
    compare.

    Args:
        n: number of items, at least 1; they are numbered from 0.

    Attributes:
        sums: (n,) float64, the excess added up.
        counts: (n,) float64, how often it was. Both may be added up over ranks that recorded different micro-batches.
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
            members: k integer tensors or lists of any length, or one tensor of k rows: the items in each micro-batch, as often as they
                are in it. An empty one where they are not known here, as those of other ranks.
            values: k numbers; NaN says nothing.

        Raises:
            ValueError: where there are not k of them, or an item has no number in [0, n); then nothing was added.
        """
        held = [self._checked(items) for items in list_of(members)]
        if len(held) != len(values):
            raise ValueError(f"Audit: there must be members for each of the {len(values)} micro-gradients that were measured; got "
                             f"{len(held)}. Give an empty tensor for a micro-batch whose members are not known here.")  # fmt: skip
        known = [value for value in values if not math.isnan(value)]
        self._recent.append((sum(known), len(known)))
        usual = sum(total for total, _ in self._recent) / max(
            sum(number for _, number in self._recent), 1
        )
        for where, value in zip(held, values, strict=True):
            if len(where) and not math.isnan(value):
                excess = torch.full(where.shape, value - usual, dtype=torch.float64, device="cpu")
                self.sums.index_add_(0, where, excess)
                self.counts.index_add_(0, where, torch.ones_like(excess))

    def _checked(self, items: Any) -> Tensor:
        """The items as indices, (m,) int64 on the CPU."""
        n = len(self.sums)
        try:
            where = items if isinstance(items, Tensor) else torch.as_tensor(items, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Audit: members must be whole numbers; got {items!r}. Give the items' numbers, from 0 on."
            ) from error
        where = where.detach().cpu().flatten()
        if not len(where):
            return where.long()
        if where.dtype.is_floating_point or where.dtype.is_complex or where.dtype == torch.bool:
            raise ValueError(
                f"Audit: members must be whole numbers; got {where.dtype}. Give the items' numbers, from 0 on."
            )
        where = where.long()
        if where.min() < 0 or where.max() >= n:
            raise ValueError(
                f"Audit: members must lie in [0, {n}); got {span(where)}. Give the n of the data set."
            )
        return where

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
            ValueError: where it is of another number of items.
        """
        if not isinstance(state, dict) or not {"sums", "counts", "recent"} <= state.keys():
            raise ValueError(
                f"Audit: the state must hold sums, counts and recent; got {state!r}. Give what state_dict() gave."
            )
        if len(state["sums"]) != len(self.sums):
            raise ValueError(
                f"Audit: the state must be of {len(self.sums)} items; got {len(state['sums'])}. Give the n that was saved."
            )
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self._recent = deque(state["recent"], maxlen=WINDOW)


class Audit(Excess):
    """Scores items by how far the micro-batches that held them were from the others.

        audit = gaf.Audit(len(dataset))
        ...
        decision = acc.step()
        audit.record(members, decision)           # members[i]: which samples micro-batch i held
        suspects = audit.scores().nan_to_num(nan=-2).argsort(descending=True)  # those never seen: last

    The score is the mean, over an item's micro-batches, of the cosine distance that decided, less the mean distance of the last 100
    steps; the row that the sum started from was compared with nothing, and is taken to be as far as those compared with it were on
    average. A distance says more than whether it was above tau, and says it of skipped steps too.

    It finds bad data that come together: a shard, a rank, a source, whose micro-batches hold little else. Wrong labels that are
    spread evenly over micro-batches it hardly finds; there the loss of single samples does (docs/audit.md has both, measured).

    Args:
        n: number of items (samples, or shards, ...), at least 1; they are numbered from 0.

    Raises:
        ValueError: for n below 1; for members that are not one tensor for each row, or not in [0, n).

    >>> audit = Audit(3)
    >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    >>> from gaf import GAF, aggregate
    >>> audit.record(torch.arange(3)[:, None], aggregate(rows, GAF(tau=0.5))[1])
    >>> audit.scores()
    tensor([ 0., -1.,  1.], dtype=torch.float64)
    """

    def record(
        self, members: Sequence[Tensor | Sequence[int]] | Tensor, decision: Decision | Outcome
    ) -> None:
        """Adds one step; a Decision on an accelerator is fetched, an Outcome (`acc.outcome`, `handle.outcome`) is already on the host.

        Args:
            members: k integer tensors or lists of any length, or one tensor of k rows: the items in each micro-batch, as often as
                they are in it. An empty one where they are not known here: under `gaf.attach` each rank knows its own; add `sums`
                and `counts` over the ranks at the end.
            decision: what was decided about these micro-batches, in the same order.

        Raises:
            TypeError, ValueError: as the class has it; then the step is not counted at all.
        """
        if not isinstance(decision, Decision | Outcome):
            raise TypeError(f"Audit: decision must be a gaf.Decision or an Outcome; got {type(decision).__name__}. "
                            "Give what acc.step() returned, or acc.outcome.")  # fmt: skip
        distances = torch.as_tensor(decision.distances, device="cpu").tolist()
        self.add(members, value_per_row(distances, distances))


def list_of(members: Any) -> list[Any]:
    """The members of each micro-batch."""
    try:
        return list(members)
    except TypeError as error:
        raise ValueError("Audit: members must be k integer tensors or lists, or one tensor of k rows; "
                         f"got {members!r}. Give the items of each micro-batch.") from error  # fmt: skip


def value_per_row(values: Sequence[float], distances: Sequence[float]) -> list[float]:
    """One value for each row (k,): its own; for the row that the sum started from, which has distance 0, the mean of the others' values.

    NaN for absent rows, whose distance is NaN, and for a start that nothing was compared with.
    """
    present = [i for i, distance in enumerate(distances) if not math.isnan(distance)]
    found = [value if i in present else math.nan for i, value in enumerate(values)]
    if present:
        start = min(present, key=lambda i: distances[i])
        others = [values[i] for i in present if i != start]
        found[start] = sum(others) / len(others) if others else math.nan
    return found


def span(where: Tensor) -> str:
    low, high = int(where.min()), int(where.max())
    return f"{low}" if low == high else f"{low} to {high}"
