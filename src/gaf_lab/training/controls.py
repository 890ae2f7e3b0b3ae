"""Control policies that replay what another run decided, without looking at the gradients (docs: what the controls say)."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf import Decision, Mean
from gaf.rules.decision import as_skip


class Replay:
    """The recorded decisions of another run: `rows[t]` micro-gradients accepted at step t, 0 for a skip. A call is a step."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows, self.step = list(rows), 0

    def planned(self, step: int, k: int) -> list[float]:
        """The k weights of step `step`, counted from 0: known before its rows are. ValueError past the recorded run's end."""
        raise NotImplementedError

    def count(self, step: int) -> int:
        """How many rows the recorded run accepted at a step."""
        if step >= len(self.rows):
            raise ValueError(
                f"replay: the recorded run must be as long as this one; it has {len(self.rows)} steps. Record a longer one."
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
    """Steps when the recorded run stepped, and averages all rows: tells "fewer steps" from agreement."""

    def conclude(self, accepted: Tensor, distances: Tensor) -> Decision:
        decision = super().conclude(accepted, distances)
        return decision if any(self.next(len(distances))) else as_skip(decision)

    def planned(self, step: int, k: int) -> list[float]:
        return [1 / k if self.count(step) else 0.0] * k


class RandomSubset(Replay):
    """Steps when the recorded run stepped, on as many rows, drawn at random: tells "smaller batches" from agreement.

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
        drawn = random.Random(f"{self.seed}/{step}").sample(range(k), count)
        return [1 / count if i in drawn else 0.0 for i in range(k)]


def as_planned(weights: Tensor, distances: Tensor) -> Decision:
    """The decision whose weights (k,) were known before; a step is one with any."""
    accepted = weights > 0
    return Decision(weights, accepted, accepted.any(), distances)
