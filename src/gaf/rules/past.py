"""What `Guard` has learned: of norms, of the step, and of how far rows are from each other."""

import math
from collections.abc import Sequence
from typing import Any

from gaf.rules.contract import describe_state
from gaf.rules.drift import Drift
from gaf.rules.finding import Finding
from gaf.rules.watch import WARM_UP, NormWatch, StepWatch


class Past:
    """What is usual, in four parts; and how many decisions there were.

    Args:
        norm_ratio: limit of `NormWatch`.
        spike_z: limit of `StepWatch`.
        drift: limit of `Drift`; None for no reports.
    """

    def __init__(self, norm_ratio: float, spike_z: float, drift: float | None):
        self.decisions = 0
        self.norms = NormWatch(norm_ratio)
        self.step = StepWatch(spike_z)
        self.norm_drift = Drift(drift or math.inf)
        self.cosine_drift = Drift(drift or math.inf)

    @property
    def parts(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if name != "decisions"}

    def wants_cosines(self, every: int) -> bool:
        """Whether it is time to look at the cosines: every so often, at first, and on suspicion."""
        step = self.decisions
        return step < WARM_UP or step % every == 0 or self.cosine_drift.suspects

    def learn(self, norms: Sequence[float], cosines: Sequence[float]) -> list[Finding]:
        """Adds one step, and gives the drifts that it shows.

        Args:
            norms: of k rows, as logarithms.
            cosines: of each row to the sum of the others. NaN in both for the unknown and broken.
        """
        self.decisions += 1
        self.norms.learn(norms)
        longer = [
            Finding(one.row, "norm drift", math.exp(one.value), math.exp(one.expected), one.steps)
            for one in self.norm_drift.learn(norms)
        ]
        turned = [
            Finding(one.row, "cosine drift", one.value, one.expected, one.steps)
            for one in self.cosine_drift.learn(cosines)
        ]
        return longer + turned

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"decisions": self.decisions} | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for the state of another policy.
        """
        if not isinstance(state, dict) or state.keys() != vars(self).keys():
            raise ValueError(
                f"Guard: the state must be of a Guard; it holds {describe_state(state)}. "
                "Build the policy as it was when it was saved."
            )
        self.decisions = state["decisions"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
