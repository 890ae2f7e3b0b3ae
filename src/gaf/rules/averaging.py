"""Policies that average all rows, whatever they hold: plain training, and one that skips steps."""

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gaf.arguments import is_number, plain_number, whole_number
from gaf.rules.contract import describe_state
from gaf.rules.decision import Decision, as_skip
from gaf.rules.sequential import Sequential
from gaf.shapes import Bool, Float64


class Mean(Sequential):
    """Plain averaging, weights 1 / k: every row counts, and a NaN goes through, as under DDP.

    Distances are those that `GAF(2.0)` would report. In statistics an absent row (zero, NaN or
    infinite) is absent, not accepted. Under `gaf.Accumulator` on an accelerator a second sum is
    kept, of the present rows, which later ones are compared with.

    Under `gaf.attach` the weights are bit for bit those of plain data parallelism. Nothing is
    measured there and nothing is paid, unless asked for:

        handle = gaf.attach(model, optimizer, gaf.Mean(measure_every=10))

    Then every 10th step, the first included, also gives each worker's norm, its cosine to the sum
    of the others and the noise scale, for 2 k numbers more than an all-reduce and one pass over the
    gradient: see `Handle.stats` and `Handle.workers`. Distances are then 1 - cosine.

    Args:
        measure_every: steps from one measurement to the next; 0 for none. `gaf.Accumulator`
            measures every step anyway.

    Raises:
        ValueError: if measure_every is not a whole number, or below 0.

    >>> Mean()(torch.eye(4, dtype=torch.float64)).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    adds_absent = True
    measure_every = 0
    step = 0  # decisions so far; counted only if some steps are measured

    def __init__(self, measure_every: int = 0) -> None:
        subject, fix = "Mean: measure_every", "0 measures nothing."
        self.measure_every = whole_number(subject, measure_every, 0, fix)

    def tau_at(self, device: torch.device) -> float:
        return 2.0  # every present row

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        self.step += self.measure_every > 0
        weights = torch.full_like(distances, 1 / len(distances))
        return Decision(weights, torch.ones_like(accepted), torch.ones_like(accepted[0]), distances)

    def private_copy(self) -> "Mean":
        """A copy that counts by itself."""
        return copy.copy(self)

    def state_dict(self) -> dict[str, Any]:
        """The number of decisions, if some of them are measured."""
        return {"step": self.step} if self.measure_every else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, also that of a Mean with another measure_every.

        Raises:
            ValueError: for the state of another policy, if some steps are measured.
        """
        if self.measure_every and state:
            self.step = step_in("a Mean", state)

    def __repr__(self) -> str:
        return f"Mean(measure_every={self.measure_every})" if self.measure_every else "Mean()"


@dataclass
class RandomSkip(Mean):
    """The control for "GAF only takes fewer steps": averages as Mean, and skips steps at random.

    A step has a fixed chance of being taken. Step t is drawn from (seed, t), so that all ranks and
    a resumed run agree. Every call is one step.

    Args:
        step_probability: chance that a step is taken, in [0, 1]. Higher steps more often.
        seed: of the draws.

    Raises:
        ValueError: if step_probability is not in [0, 1].
    """

    step_probability: float
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        p = self.step_probability
        if not is_number(p) or not 0 <= p <= 1:
            raise ValueError(
                f"RandomSkip: step_probability must lie in [0, 1]; got {p!r}. "
                "Give the share of steps that GAF took."
            )
        self.step_probability = plain_number(p)
        self.seed = whole_number("RandomSkip: seed", self.seed, None, "0 is the default.")

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        weights = self.planned(self.step, len(distances))
        self.step += 1
        decision = super().conclude(accepted, distances)
        return decision if any(weights) else as_skip(decision)

    def planned(self, step: int, k: int) -> list[float]:
        """The k weights of step `step`, counted from 0: known before its rows are."""
        draw = random.Random(f"{self.seed}/{step}").random()
        return [1 / k if draw < self.step_probability else 0.0] * k

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for the state of another policy.
        """
        self.step = step_in("a RandomSkip", state)


def step_in(kind: str, state: Any) -> int:
    """The number of steps that a state holds; ValueError for the state of another policy.

    kind: of policy, with its article.
    """
    name = kind.split()[-1]
    if not isinstance(state, dict) or state.keys() != {"step"}:
        raise ValueError(
            f"{name}: the state must be of {kind}, a number of steps; "
            f"it holds {describe_state(state)}. Build the policy as it was when it was saved."
        )
    return whole_number(
        f"{name}: the state's step", state["step"], 0, "Load what state_dict() gave."
    )


def measures(policy: Any) -> bool:
    """Whether a policy that averages asks for measurements of some steps under `gaf.attach`."""
    return isinstance(policy, Mean) and policy.measure_every > 0


def measures_next(policy: Any) -> bool:
    """Whether it asks for the next step's."""
    return measures(policy) and policy.step % policy.measure_every == 0


def averages(policy: Any) -> bool:
    """Whether every row counts, whatever the Gram matrix is: `Mean` and its subclasses."""
    return isinstance(policy, Mean) and type(policy).__call__ is Sequential.__call__
