"""Scores samples, shards or ranks by how far their micro-batches disagreed with the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gaf.record.excess import Excess
from gaf.record.outcome import Outcome
from gaf.rules.decision import Decision


class Audit(Excess):
    """Scores items by how far the micro-batches that held them were from the others.

        audit = gaf.Audit(len(dataset))
        ...
        decision = acc.step()
        audit.record(members, decision)       # members[i]: which samples micro-batch i held
        suspects = audit.scores().nan_to_num(nan=-2).argsort(descending=True)  # unseen ones last

    The score is the mean, over an item's micro-batches, of the cosine distance that decided, less
    the mean distance of the last 100 steps. The row that the sum started from was compared with
    nothing; it is taken to be as far as those compared with it were on average. A distance carries
    more than whether it was above tau, and it is there on skipped steps too.

    An audit finds bad data that come together: a shard, a rank, a source, whose micro-batches hold
    little else. It hardly finds wrong labels that are spread evenly over micro-batches; the loss of
    single samples does (docs/audit.md has both, measured).

    Args:
        n: number of items (samples, or shards, ...), at least 1; they are numbered from 0.

    Raises:
        ValueError: for n below 1; for members that are not one tensor for each row, or not in
            [0, n).

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
        """Adds one step.

        A Decision on an accelerator is fetched; an Outcome (`acc.outcome`, `handle.outcome`) is
        already on the host.

        Args:
            members: k integer tensors or lists of any length, or one tensor of k rows: the items in
                each micro-batch, as often as they are in it. An empty one if they are not known
                here: under `gaf.attach` each rank knows its own; add `sums` and `counts` over the
                ranks at the end.
            decision: what was decided about these micro-batches, in the same order.

        Raises:
            TypeError, ValueError: as the class has it; then the step is not counted at all.
        """
        if not isinstance(decision, Decision | Outcome):
            raise TypeError(
                "Audit: decision must be a gaf.Decision or an Outcome; "
                f"got {type(decision).__name__}. Give what acc.step() returned, or acc.outcome."
            )
        distances = torch.as_tensor(decision.distances, device="cpu").tolist()
        self.add(members, value_per_row(distances, distances))


def value_per_row(values: Sequence[float], distances: Sequence[float]) -> list[float]:
    """One value for each row, (k,): its own, and for the start the mean of the others' values.

    The start is the row that the sum started from, at distance 0; there is none if each row was
    compared with the sum of all others. NaN for absent rows, whose distance is NaN, and for a start
    that nothing was compared with.
    """
    present = [i for i, distance in enumerate(distances) if not math.isnan(distance)]
    found = [value if i in present else math.nan for i, value in enumerate(values)]
    start = next((i for i in present if distances[i] == 0), None)
    if start is not None:
        others = [values[i] for i in present if i != start]
        found[start] = sum(others) / len(others) if others else math.nan
    return found
