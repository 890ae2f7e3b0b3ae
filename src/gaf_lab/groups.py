"""One decision for each bucket of parameters, on one device: what GAF(scope="group") does under DistributedDataParallel."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import gaf
from gaf.gate import gate

FIRST, OTHERS = 2**20, 25 * 2**20  # bytes: the caps of DistributedDataParallel's buckets


def buckets(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters as DistributedDataParallel puts them into buckets: from the last layer on, the first bucket small."""
    order = list(reversed(params))
    groups, _ = _compute_bucket_assignment_by_size(list[Tensor](order), [FIRST, OTHERS])
    return [[order[j] for j in group] for group in groups]


class PerBucket:
    """Has the methods of gaf.Accumulator; within, an Accumulator and an optimizer of the same kind for each bucket.

    Args:
        optimizer: of all parameters.
        make: an optimizer like it, of some of them.
        policy: decides on every bucket.

    Every bucket has a backward pass of its own, so a step costs more than under attach, which shares one. A row counts as
    accepted where some bucket accepts it, a step as taken where some bucket steps; distances are means over buckets.
    """

    def __init__(self, optimizer: Optimizer, make: Callable[[list[nn.Parameter]], Optimizer], policy: gaf.GAF) -> None:
        self.optimizer = optimizer  # never stepped: its learning rate, which a schedule may move, is everyone's
        self.optimizers = [make(group) for group in buckets(optimizer.param_groups[0]["params"])]
        self.parts = [gaf.Accumulator(one, dataclasses.replace(policy, scope="all")) for one in self.optimizers]
        self.outcome: gaf.Outcome | None = None
        self._progress = (0, 0)  # steps decided and steps taken by this object; unlike stats, not restored
        self._counts = [0, 0]  # the same since the start of the run

    def backward(self, loss: Tensor) -> None:
        for part in self.parts:
            part.backward(loss, retain_graph=part is not self.parts[-1])

    def step(self) -> None:
        for one in self.optimizers:
            one.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"]
        for part in self.parts:
            part.step()
        self.outcome = together([part.outcome for part in self.parts if part.outcome is not None])
        self._progress = (self._progress[0] + 1, self._progress[1] + self.outcome.stepped)
        self._counts = [self._counts[0] + 1, self._counts[1] + self.outcome.stepped]

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        return gate(scheduler, lambda: self._progress)

    def stats(self, b: float = 1) -> dict[str, Any]:
        """Those of the bucket with the most parameters, with `steps` and `stepped` of the whole."""
        sizes = [sum(p.numel() for p in one.param_groups[0]["params"]) for one in self.optimizers]
        return self.parts[sizes.index(max(sizes))].stats(b) | {"steps": self._counts[0], "stepped": self._counts[1]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": [part.state_dict() for part in self.parts],
            "optimizers": [one.state_dict() for one in self.optimizers],
            "counts": list(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, one in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(one)
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(one)
        self._counts = list(state["counts"])


def together(outcomes: list[gaf.Outcome]) -> gaf.Outcome:
    """The buckets' outcomes as one."""
    distances = [[d for d in row if not math.isnan(d)] for row in zip(*(o.distances for o in outcomes), strict=True)]
    return gaf.Outcome(
        stepped=any(o.stepped for o in outcomes),
        accepted=[any(row) for row in zip(*(o.accepted for o in outcomes), strict=True)],
        distances=[sum(row) / len(row) if row else math.nan for row in distances],
        weights=[sum(row) / len(row) for row in zip(*(o.weights for o in outcomes), strict=True)],
        norms2=[sum(row) for row in zip(*(o.norms2 for o in outcomes), strict=True)],
        signal=sum(o.signal for o in outcomes),
    )
