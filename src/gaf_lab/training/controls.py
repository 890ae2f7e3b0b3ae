"""Control policies that replay the decisions of another run, without a look at the gradients.

See docs/controls.md for the questions that they answer.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf import Agreement, Decision, Mean
from gaf.rules.decision import as_skip


class Replay:
    """The recorded decisions of another run. A call is a step.

    rows: `rows[t]` micro-gradients were accepted at step t, 0 for a skip.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows, self.step = list(rows), 0

    def planned(self, step: int, k: int) -> list[float]:
        """The k weights of step `step`, counted from 0, known before its rows are.

        ValueError past the end of the recorded run.
        """
        raise NotImplementedError

    def count(self, step: int) -> int:
        """The number of rows that the recorded run accepted at a step."""
        if step >= len(self.rows):
            raise ValueError(
                "replay: the recorded run must be as long as this one; "
                f"it has {len(self.rows)} steps. Record a longer one."
            )
        return self.rows[step]

    def next(self, k: int) -> list[float]:
        weights = self.planned(self.step, k)
        self.step += 1
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class ReplaySkip(Replay, Mean):
    """Steps when the recorded run stepped, and averages all rows.

    It separates the effect of fewer steps from that of agreement.
    """

    def conclude(self, accepted: Tensor, distances: Tensor) -> Decision:
        decision = super().conclude(accepted, distances)
        return decision if any(self.next(len(distances))) else as_skip(decision)

    def planned(self, step: int, k: int) -> list[float]:
        return [1 / k if self.count(step) else 0.0] * k


class RandomSubset(Replay):
    """Steps when the recorded run stepped, on as many rows, drawn at random.

    It separates the effect of smaller batches from that of agreement.

    Args:
        rows: accepted rows at each step of the recorded run.
        seed: of the draws; step t is drawn from (seed, t).
    """

    def __init__(self, rows: Sequence[int], seed: int) -> None:
        super().__init__(rows)
        self.seed = seed

    def __call__(self, gram: Tensor) -> Decision:
        weights = torch.tensor(self.next(len(gram)), dtype=torch.float64).to(gram.device)
        return as_planned(weights, Mean()(gram).distances)

    def planned(self, step: int, k: int) -> list[float]:
        count = min(self.count(step), k)
        rows = random.Random(f"{self.seed}/{step}").sample(range(k), count)
        return [1 / count if i in rows else 0.0 for i in range(k)]


class Sizes(Agreement):
    """Steps of given numbers of micro-batches, one after the other, whatever the gradients are.

    Args:
        sizes: micro-batches of each step.
        rate: as for `gaf.Agreement`.
    """

    def __init__(self, sizes: Sequence[int], rate: Any) -> None:
        super().__init__(0.5, max(2, *sizes), rate=rate)
        self.sizes, self.step = list(sizes), 0

    def suffices(self, c: int, measure: Any) -> bool:
        if self.step >= len(self.sizes):
            raise ValueError(
                "replay: the recorded run must be as long as this one; "
                f"it has {len(self.sizes)} steps. Record a longer one."
            )
        return c >= self.sizes[self.step]

    def learn(self, c: int, means: Any) -> None:
        super().learn(c, means)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"learned": super().state_dict(), "step": self.step}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state["learned"])
        self.step = state["step"]


def even_sizes(sizes: Sequence[int]) -> list[int]:
    """Sizes that differ by at most one, with the same mean; for steps that some cut short, too."""
    total, steps = sum(sizes), len(sizes)
    ends = [t * total // steps for t in range(2 * steps + 2)]
    return [b - a for a, b in itertools.pairwise(ends)]


def as_planned(weights: Tensor, distances: Tensor) -> Decision:
    """The decision whose weights (k,) were known before; it steps if any is positive."""
    accepted = weights > 0
    return Decision(weights, accepted, accepted.any(), distances)
