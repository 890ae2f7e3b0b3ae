"""Control policies that replay what another run decided, without looking at the gradients (docs: what the controls say)."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf import Decision, Mean
from gaf.policies import skipped


class Replay:
    """The recorded decisions of another run: `rows[t]` micro-gradients accepted at step t, 0 for a skip. A call is a step."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows, self.step = list(rows), 0

    def next(self) -> int:
        if self.step >= len(self.rows):
            raise ValueError(f"replay: the recorded run must be as long as this one; it has {len(self.rows)} steps. Record a longer one.")
        self.step += 1
        return self.rows[self.step - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class ReplaySkip(Replay, Mean):
    """Steps when the recorded run stepped, and averages all rows: tells "fewer steps" from agreement."""

    def conclude(self, accepted: Tensor, distances: Tensor) -> Decision:
        decision = super().conclude(accepted, distances)
        return decision if self.next() else skipped(decision)


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
        k, step = len(gram), self.step
        count = min(self.next(), k)
        drawn = random.Random(f"{self.seed}/{step}").sample(range(k), count)
        weights = torch.zeros(k, dtype=torch.float64)
        weights[drawn] = 1 / max(count, 1)
        weights = weights.to(gram.device)
        stepped = torch.tensor(count > 0, device=gram.device)
        return Decision(weights, weights > 0, stepped, Mean()(gram).distances)
