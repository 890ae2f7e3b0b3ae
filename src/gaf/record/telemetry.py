"""What the decisions said, as plain numbers. Counts what a Decision holds; computes no decision again."""

import math
import sys
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf.arguments import ABOVE_0, real_number
from gaf.rules.contract import min_accepted_of, tau_given
from gaf.rules.decision import Decision, Evidence

WINDOW = 100  # steps that the averages and the warning look back


@dataclass(frozen=True)
class Outcome:
    """A Decision with its evidence, on the host, as plain numbers."""

    stepped: bool
    accepted: list[bool]
    distances: list[float]
    weights: list[float]
    norms2: list[float]
    signal: float
    tau: float = math.nan

    @classmethod
    def fetch(cls, decision: Decision, evidence: Evidence) -> "Outcome":
        """The one transfer to the host that a step needs anyway, with all that is worth knowing in it."""
        return cls.unpacked(packed(decision, evidence).tolist())

    @classmethod
    def unpacked(cls, flat: list[float]) -> "Outcome":
        """From the 4 k + 3 numbers that `packed` gives."""
        k = len(flat) // 4
        return cls(
            accepted=[bool(a) for a in flat[:k]],
            distances=flat[k : 2 * k],
            weights=flat[2 * k : 3 * k],
            norms2=flat[3 * k : 4 * k],
            stepped=bool(flat[4 * k]),
            signal=flat[4 * k + 1],
            tau=flat[4 * k + 2],
        )

    def unmeasured(self) -> "Outcome":
        """The same where no row was looked at, as in a plain all-reduce: nothing is known of distances and norms."""
        return replace(self, distances=[], norms2=[])

    def skipped(self) -> "Outcome":
        """The same evidence, no step."""
        return replace(
            self,
            stepped=False,
            accepted=[False] * len(self.accepted),
            weights=[0.0] * len(self.weights),
        )

    @property
    def absent(self) -> int:
        return sum(map(math.isnan, self.distances))

    @property
    def taken(self) -> int:
        """Accepted rows that were present: `Mean` accepts absent ones too, and they count as absent."""
        if not self.distances:
            return sum(self.accepted)
        return sum(
            a and not math.isnan(d) for a, d in zip(self.accepted, self.distances, strict=True)
        )

    @property
    def compared(self) -> list[float]:
        """Distances of the rows that were compared with a running sum: all present ones but the start, whose own is 0."""
        return sorted(d for d in self.distances if not math.isnan(d))[1:]


def packed(decision: Decision, evidence: Evidence) -> Tensor:
    """All of both in one vector (4 k + 3,) float64, where they lie."""
    parts = (
        decision.accepted,
        decision.distances,
        decision.weights,
        evidence.norms2,
        decision.stepped,
        evidence.signal,
        evidence.tau,
    )
    return torch.cat([p.reshape(-1).to(evidence.norms2) for p in parts])


@dataclass(frozen=True)
class Recent:
    """One step, condensed to what the averages and the warnings need."""

    compared: int
    accepted: int  # of the compared rows
    distance_sum: float
    distance_min: float
    dispersion: float
    norm2: float
    signal: float
    tau: float = math.nan

    @classmethod
    def of(cls, outcome: Outcome, scale: float) -> "Recent":
        scale = (
            scale or math.nan
        )  # 0, where overflows have eaten it up: then nothing is known of norms
        norms = [math.sqrt(n) / scale for n in outcome.norms2 if 0 < n < math.inf]
        mean = sum(norms) / len(norms) if norms else math.nan
        spread = math.sqrt(sum((n - mean) ** 2 for n in norms) / len(norms)) if norms else math.nan
        return cls(
            compared=len(outcome.compared),
            accepted=max(outcome.taken - 1, 0) if outcome.distances else 0,
            distance_sum=sum(outcome.compared),
            distance_min=min(outcome.compared, default=math.nan),
            dispersion=spread / mean if norms else math.nan,
            norm2=sum(n * n for n in norms) / len(norms)
            if math.isfinite(outcome.signal)
            else math.nan,
            signal=outcome.signal / scale**2,
            tau=outcome.tau,
        )


class Telemetry:
    """Counts since the start, averages over the last 100 steps."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(
            ("steps", "stepped", "micro_gradients", "accepted", "rejected", "absent"), 0
        )
        self.recent: deque[Recent] = deque(maxlen=WINDOW)
        # steps in a row with none, and with all, of the compared rows accepted
        self.none_for = self.all_for = 0
        self.warned: set[str] = set()

    def record(self, outcome: Outcome, policy: Any, scale: float = 1.0) -> None:
        """Adds one step. policy: what decided, for the warnings. scale: what a GradScaler multiplied the rows by."""
        k, accepted, absent = len(outcome.accepted), outcome.taken, outcome.absent
        rejected = sum(
            not a and not math.isnan(d)
            for a, d in zip(outcome.accepted, outcome.distances, strict=False)
        )
        moved = {"steps": 1, "stepped": outcome.stepped, "micro_gradients": k}
        for key, value in (
            moved | {"accepted": accepted, "rejected": rejected, "absent": absent}
        ).items():
            self.totals[key] += int(value)
        self.recent.append(Recent.of(outcome, scale))
        if not math.isnan(outcome.tau):
            self._warn(outcome, self.recent[-1], policy)

    def take_back(self, outcome: Outcome) -> None:
        """The last step recorded turned out not to be taken: its accepted rows count as rejected."""
        accepted = sum(outcome.accepted)
        for key, change in (
            ("stepped", outcome.stepped),
            ("accepted", accepted),
            ("rejected", -accepted),
        ):
            self.totals[key] -= int(change)
        self.recent[-1] = replace(self.recent[-1], accepted=0)

    def _warn(self, outcome: Outcome, step: Recent, policy: Any) -> None:
        if len(outcome.accepted) == 1 and outcome.stepped:
            self._warn_once(
                "one",
                "One micro-gradient has nothing to agree with: it was stepped on as in plain training.",
            )
        if len(self.recent) == WINDOW and all(math.isnan(r.dispersion) for r in self.recent):
            self._warn_once("absent", f"Every micro-gradient was zero, NaN or infinite in {WINDOW} steps, and nothing moved: has the loss "
                "become NaN, or does it not depend on the parameters?")  # fmt: skip
        if not step.compared:
            return
        self.none_for = 0 if step.accepted else self.none_for + 1
        self.all_for = self.all_for + 1 if step.accepted == step.compared else 0
        seen = [r for r in self.recent if r.compared]
        if self.none_for >= WINDOW:
            self._warn_once(
                "none",
                f"No micro-gradient was accepted in {WINDOW} steps: "
                + remedy(policy, outcome, seen),
            )
        tau = tau_given(policy) if isinstance(tau_given(policy), Real) else 2
        if self.all_for >= WINDOW and tau < 2:
            mean = total(r.distance_sum for r in seen) / total(r.compared for r in seen)
            self._warn_once("all", f"Every micro-gradient was accepted in {WINDOW} steps: tau = {tau} filters nothing here. "
                f"The mean distance was {mean:.3f}: lower tau to about that, or use smaller micro-batches. "
                "tau does not transfer between tasks; acc.stats() shows the distances.")  # fmt: skip

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"gaf: {message}", stacklevel=frames_inside() + 1)

    def stats(self, b: float = 1) -> dict[str, float]:
        """See `gaf.Accumulator.stats`."""
        b = real_number("stats: b", b, ABOVE_0, math.inf, "It counts the samples in a micro-batch.")
        recent = self.recent
        norm2, signal = total(r.norm2 for r in recent), total(r.signal for r in recent)
        noise = max(norm2 - signal, 0.0)
        return self.totals | {
            "acceptance": ratio(sum(r.accepted for r in recent), sum(r.compared for r in recent)),
            "distance_mean": ratio(
                total(r.distance_sum for r in recent), total(r.compared for r in recent)
            ),
            "distance_min": min((r.distance_min for r in recent if r.compared), default=math.nan),
            "norm_dispersion": ratio(
                total(r.dispersion for r in recent),
                sum(math.isfinite(r.dispersion) for r in recent),
            ),
            "tau": recent[-1].tau if recent else math.nan,
            "noise_scale": math.nan
            if not any(r.compared for r in recent)
            else b * noise / signal
            if signal > 0
            else math.inf,
        }

    def state_dict(self) -> dict[str, Any]:
        # rows without names: torch.distributed.checkpoint takes dictionaries in a list apart, and then misses them in a new run
        lately = {
            "recent": [list(astuple(r)) for r in self.recent],
            "none_for": self.none_for,
            "all_for": self.all_for,
        }
        return {"totals": dict(self.totals), "warned": sorted(self.warned)} | lately

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for what is no such state.
        """
        wanted = self.state_dict().keys()
        if not isinstance(state, dict) or not wanted <= state.keys():
            found = sorted(map(str, state)) if isinstance(state, dict) else repr(state)
            raise ValueError(f"gaf: the state of the counts must hold {', '.join(sorted(wanted))}; got {found}. "
                             "Load what state_dict() of an Accumulator or a Handle gave, whole.")  # fmt: skip
        self.totals = dict(state["totals"])
        self.recent = deque((Recent(*r) for r in state["recent"]), maxlen=WINDOW)
        self.none_for, self.all_for = state["none_for"], state["all_for"]
        self.warned = set(state["warned"])


def remedy(policy: Any, outcome: Outcome, seen: list[Recent]) -> str:
    """Why nothing is accepted, and what to do."""
    least, k = min(r.distance_min for r in seen), len(outcome.accepted)
    if least <= outcome.tau and min_accepted_of(policy) > 2:
        return (f"min_accepted = {policy.min_accepted} of {k} is more than ever agreed. Lower min_accepted; acc.stats() shows the "
                "distances.")  # fmt: skip
    fixed = isinstance(tau_given(policy), Real)
    way = (
        f"tau = {policy.tau} does not fit"
        if fixed
        else f"{getattr(policy, 'tau', policy)} came to {outcome.tau:.3f} and does not fit"
    )
    change = "raise tau above that" if fixed else "choose one that accepts more"
    return (f"{way} this task. The smallest distance seen was {least:.3f}: {change}, or use larger micro-batches. "
            "tau does not transfer between tasks; acc.stats() shows the distances.")  # fmt: skip


def frames_inside() -> int:
    """Calls between here and the first line outside this package and torch: the user's, which a warning is to name."""
    here, frame, count = (
        (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)),
        sys._getframe(1),
        1,
    )
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, count = frame.f_back, count + 1
    return count - 1


def total(values: Iterable[float]) -> float:
    return math.fsum(v for v in values if math.isfinite(v))


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
