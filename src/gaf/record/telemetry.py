"""Statistics of the decisions: totals since the start, and averages over the last steps.

They count what a Decision holds, and compute no decision again.
"""

import math
from collections import deque
from dataclasses import astuple, replace
from typing import Any

from gaf.arguments import ABOVE_0, real_number
from gaf.record.hints import Hints
from gaf.record.outcome import Outcome
from gaf.record.recent import WINDOW, Recent, finite_sum, ratio

TOTALS = ("steps", "stepped", "micro_gradients", "accepted", "rejected", "absent")


class Telemetry:
    """Counts since the start, averages over the last 100 steps that were measured."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(TOTALS, 0)
        self.recent: deque[Recent] = deque(maxlen=WINDOW)
        self.hints = Hints()

    def record(self, outcome: Outcome, policy: Any, scale: float = 1.0) -> None:
        """Adds one step.

        Args:
            outcome: what was decided.
            policy: what decided, for the warnings.
            scale: what a GradScaler multiplied the rows by.
        """
        self.totals["steps"] += 1
        self.totals["stepped"] += int(outcome.stepped)
        self.totals["micro_gradients"] += len(outcome.accepted)
        self.totals["accepted"] += outcome.taken
        self.totals["rejected"] += outcome.rejected
        self.totals["absent"] += outcome.absent
        if outcome.measured:
            self.recent.append(Recent.of(outcome, scale))
        if not math.isnan(outcome.tau):
            self.hints.look(outcome, self.recent, policy)

    def take_back(self, outcome: Outcome) -> None:
        """The last step was not taken after all: its accepted rows count as rejected."""
        accepted = sum(outcome.accepted)
        self.totals["stepped"] -= int(outcome.stepped)
        self.totals["accepted"] -= accepted
        self.totals["rejected"] += accepted
        self.recent[-1] = replace(self.recent[-1], accepted=0)

    def stats(self, b: float = 1) -> dict[str, float]:
        """See `gaf.Accumulator.stats`."""
        b = real_number("stats: b", b, ABOVE_0, math.inf, "It counts the samples in a micro-batch.")
        recent = self.recent
        compared = sum(r.compared for r in recent)
        known_norms = sum(math.isfinite(r.dispersion) for r in recent)
        return self.totals | {
            "acceptance": ratio(sum(r.accepted for r in recent), compared),
            "distance_mean": ratio(finite_sum(r.distance_sum for r in recent), compared),
            "distance_min": min((r.distance_min for r in recent if r.compared), default=math.nan),
            "norm_dispersion": ratio(finite_sum(r.dispersion for r in recent), known_norms),
            "tau": recent[-1].tau if recent else math.nan,
            "noise_scale": self._noise_scale(b),
        }

    def cosines(self) -> dict[str, float]:
        """Of the rows to the sum of the others: mean and minimum."""
        known = [r for r in self.recent if r.cosines]
        return {
            "cosine_mean": ratio(sum(r.cosine_sum for r in known), sum(r.cosines for r in known)),
            "cosine_min": min((r.cosine_min for r in known), default=math.nan),
        }

    def _noise_scale(self, b: float) -> float:
        """B = tr(Sigma) / |g|^2; NaN if nothing was measured, infinite for no common direction."""
        if not any(math.isfinite(r.signal) for r in self.recent):
            return math.nan
        signal = finite_sum(r.signal for r in self.recent)
        noise = max(finite_sum(r.norm2 for r in self.recent) - signal, 0.0)
        return b * noise / signal if signal > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        # rows without names: torch.distributed.checkpoint takes dictionaries in a list apart,
        # and then misses them in a new run
        return {
            "totals": dict(self.totals),
            "warned": sorted(self.hints.warned),
            "recent": [list(astuple(r)) for r in self.recent],
            "none_for": self.hints.steps_without_acceptance,
            "all_for": self.hints.steps_all_accepted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for what is no such state.
        """
        wanted = self.state_dict().keys()
        if not isinstance(state, dict) or not wanted <= state.keys():
            found = sorted(map(str, state)) if isinstance(state, dict) else repr(state)
            raise ValueError(
                f"gaf: the state of the counts must hold {', '.join(sorted(wanted))}; got {found}. "
                "Load what state_dict() of an Accumulator or a Handle gave, whole."
            )
        self.totals = dict(state["totals"])
        self.recent = deque((Recent(*r) for r in state["recent"]), maxlen=WINDOW)
        self.hints.steps_without_acceptance, self.hints.steps_all_accepted = (
            state["none_for"],
            state["all_for"],
        )
        self.hints.warned = set(state["warned"])
