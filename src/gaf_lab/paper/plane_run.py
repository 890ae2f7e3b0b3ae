"""A run of the rule on a model of two weights, whose gradients can be drawn as they are.

Logistic regression in the plane, 40% of the labels flipped, k micro-batches a step, aggregated by
`gaf.aggregate`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import gaf
from gaf.rules.contract import Policy
from gaf_lab.data.sampling import generator

SAMPLES, RATE, K, B, TAU, LR, STEPS = 2000, 0.4, 6, 8, 0.5, 0.5, 100
TEACHER = (2.0, 1.5)  # labels are drawn from the logistic model with these weights
START_WEIGHTS = (-1.2, 1.9)


@dataclass(frozen=True)
class PlaneProblem:
    """Samples and their labels, in float64.

    Attributes:
        x: (n, 2), from a normal distribution.
        true: (n,), labels drawn from the teacher's probabilities.
        given: (n,), the labels after some were flipped.
    """

    x: Tensor
    true: Tensor
    given: Tensor

    def gradient(self, w: Tensor, index: Tensor) -> Tensor:
        """The gradient (2,) of the mean logistic loss of some samples under their given labels."""
        x, y = self.x[index], self.given[index]
        return x.T @ (torch.sigmoid(x @ w) - y) / len(x)

    def loss(self, w: Tensor, y: Tensor) -> Tensor:
        """Mean logistic loss over all samples with labels y, for weights w (..., 2): (...)."""
        scores = w @ self.x.T
        return (torch.nn.functional.softplus(scores) - scores * y).mean(-1)

    def optimum(self, y: Tensor) -> Tensor:
        """The weights (2,) at which the gradient under labels y vanishes, by Newton's method."""
        w = self.x.new_zeros(2)
        for _ in range(50):
            p = torch.sigmoid(self.x @ w)
            hessian = (self.x * (p * (1 - p))[:, None]).T @ self.x / len(self.x)
            w = w - torch.linalg.solve(hessian, self.x.T @ (p - y) / len(self.x))
        return w


def make_plane_problem(seed: int = 0) -> PlaneProblem:
    draw = generator(seed, "plane")
    x = torch.randn(SAMPLES, 2, generator=draw, dtype=torch.float64)
    chance = torch.sigmoid(x @ torch.tensor(TEACHER, dtype=torch.float64))
    true = (torch.rand(SAMPLES, generator=draw, dtype=torch.float64) < chance).double()
    flipped = torch.randperm(SAMPLES, generator=draw)[: int(RATE * SAMPLES)]
    given = true.clone()
    given[flipped] = 1 - given[flipped]
    return PlaneProblem(x, true, given)


@dataclass(frozen=True)
class PlaneStep:
    """Weights w (2,), the micro-gradients there (k, 2), the update (2,), and the decision."""

    w: Tensor
    rows: Tensor
    update: Tensor
    decision: gaf.Decision


def descend(problem: PlaneProblem, policy: Policy, seed: int = 0) -> list[PlaneStep]:
    """STEPS steps of SGD at LR from START_WEIGHTS, with the same micro-batches for every policy."""
    draw = generator(seed, "plane batches")
    w = torch.tensor(START_WEIGHTS, dtype=torch.float64)
    steps = []
    for _ in range(STEPS):
        batches = torch.randint(SAMPLES, (K, B), generator=draw)
        rows = torch.stack([problem.gradient(w, index) for index in batches])
        update, decision = gaf.aggregate(rows, policy)
        steps.append(PlaneStep(w, rows, update, decision))
        w = w - LR * update
    return steps


def step_to_show(steps: list[PlaneStep]) -> int:
    """The first step that accepts half of its micro-gradients, the second among them."""
    for number, step in enumerate(steps):
        accepted = step.decision.accepted
        if int(accepted.sum()) == K // 2 and bool(accepted[1]):
            return number
    raise AssertionError("no step accepts half of its micro-gradients and the second of them")
