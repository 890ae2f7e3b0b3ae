"""Guard: the average of all rows, unless something is broken; and the name of what is."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf.rules.decision import Decision
from gaf.rules.finding import Finding, OnAlarm
from gaf.rules.gram import check_gram
from gaf.rules.guard_arguments import (
    Spike,
    as_deviations,
    as_on_alarm,
    as_period,
    as_ratio,
    as_spike,
)
from gaf.rules.past import Past
from gaf.rules.row_sums import RowSums
from gaf.rules.watch import find_not_finite
from gaf.shapes import Float64


class Guard:
    """Averages all rows as `Mean` does, unless something is broken; and names what is.

    A broken row is left out of the average, and of what is learned. With half of the rows or more
    broken, the step is skipped. A row of zeros is not broken. A row is broken

    - if it is not finite;
    - if its norm is more than `norm_ratio` times the median of the others', and as many times the
      largest norm of any other row of late (which fades by half in 350 steps); in the first 20
      steps, `norm_ratio` squared times both. With k = 2 its own past shows whether it has changed;
    - with `cosine_z`, if its cosine to the sum of the others lies that many standard deviations
      below its usual one, relative to the others'.

    Norms are looked at in every step. Under `gaf.attach` cosines take a second pass over the
    gradient: they are looked at in every `cosine_every`-th step, in the first 20, and in every one
    while a worker is under suspicion, its sum of deviations being above a sixth of `drift`. With
    `cosine_z` or `spike`, and where K is there anyway (`gaf.Accumulator`), it is every step.

    A step whose average is far too long is skipped or shortened with `spike`. A row that drifts
    away slowly, by its norm or its cosine, is reported, and never left out.

    With one row nothing can be compared. With two their cosines are equal: then only norms and
    numbers that are not finite name a row, and no drift is reported.

    Args:
        norm_ratio: at least 1. Higher leaves out less.
        cosine_z: above 0; None: no row is left out for its direction. Higher leaves out less.
        cosine_every: steps from one look at the cosines to the next, at least 1. Higher costs less,
            and reports a drift of the cosine later.
        spike: what happens to a step whose average has a norm `spike_z` standard deviations above
            the usual one (in logarithms): None nothing, "skip", or "clip" to that limit.
        spike_z: above 0. Higher lets more pass.
        drift: the limit of the cumulative sums in standard deviations, above 0; None: no reports.
            Higher reports less, and later.
        on_alarm: called with each new alarm, a dict (see `gaf.Accumulator.alarms`), under
            `gaf.attach` on every rank; what it raises becomes a warning. `gaf.all_reduce` and
            `gaf.aggregate` keep no alarms: look at `findings`.

    Attributes:
        findings: what was noticed in the last decision.
        loss_scale: what the rows were multiplied by; an engine sets it.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if on_alarm cannot be called.

    >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [float("nan"), 0.0]])
    >>> from gaf import aggregate
    >>> update, decision = aggregate(rows, Guard())
    >>> update, decision.accepted
    (tensor([0.9000, 0.3000]), tensor([ True,  True, False]))
    """

    def __init__(
        self,
        *,
        norm_ratio: float = 10.0,
        cosine_z: float | None = None,
        cosine_every: int = 4,
        spike: Spike | None = None,
        spike_z: float = 6.0,
        drift: float | None = 30.0,
        on_alarm: OnAlarm | None = None,
    ) -> None:
        self.norm_ratio = as_ratio(norm_ratio)
        self.cosine_z = None if cosine_z is None else as_deviations("cosine_z", cosine_z, 6)
        self.cosine_every = as_period(cosine_every)
        self.spike, self.spike_z = as_spike(spike), as_deviations("spike_z", spike_z, 6)
        self.drift = None if drift is None else as_deviations("drift", drift, 30)
        self.on_alarm = as_on_alarm(on_alarm)
        self.findings: list[Finding] = []
        self.loss_scale = 1.0
        self._past = Past(self.norm_ratio, self.spike_z, self.drift)

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        """Decides from the Gram matrix, (k, k) float64, of which it needs the row sums."""
        check_gram(gram)
        return self.judge(RowSums.of_gram(gram))

    def judge(self, sums: RowSums) -> Decision:
        """Decides from what a plain all-reduce shows. Waits for the device."""
        norms2, measured = sums.norms2.tolist(), sums.cosines
        cosines = measured.tolist()
        norms = [self._log_norm(norm2) for norm2 in norms2]
        self.findings = find_not_finite(norms2) + self._past.norms.find(norms)
        if not self.findings:
            self.findings = self._find_turned(cosines)
        broken, factor = {finding.row for finding in self.findings}, 1.0
        if broken:
            # the sum of all rows, and so the cosines to it, say nothing of the others
            cosines = [math.nan] * len(cosines)
            norms = [math.nan if i in broken else norm for i, norm in enumerate(norms)]
        else:
            factor = self._factor(self._log_norm(float(sums.total2) / len(norms) ** 2))
        self.findings += self._past.learn(norms, cosines)
        return decision_without(broken, factor, measured)

    @property
    def needs_cosines(self) -> bool:
        """Whether the next decision needs more than the norms."""
        if self.cosine_z is not None or self.spike is not None:
            return True
        return self._past.wants_cosines(self.cosine_every)

    def _log_norm(self, norm2: float) -> float:
        """Of the gradient, whatever the loss scale; NaN if it is zero or not finite."""
        if not 0 < norm2 < math.inf:
            return math.nan
        return 0.5 * math.log(norm2) - math.log(self.loss_scale or 1.0)

    def _find_turned(self, cosines: list[float]) -> list[Finding]:
        """Rows whose cosine to the others is far below their usual one."""
        if self.cosine_z is None:
            return []
        scores, usual = self._past.cosine_drift.scores(cosines)
        return [
            Finding(i, "cosine", cosines[i], usual[i])
            for i, score in enumerate(scores)
            if score < -self.cosine_z
        ]

    def _factor(self, norm: float) -> float:
        """What the average is multiplied by: 1, or less after a spike; 0 for a skip."""
        step = self._past.step
        excess = step.excess(norm) if self.spike else 0.0
        if excess:
            usual = math.exp(step.usual)
            self.findings.append(Finding(None, "step norm", math.exp(norm), usual))
        step.learn(norm)
        return 0.0 if excess and self.spike == "skip" else math.exp(-excess)

    def overflowed(self, norms2: Sequence[float]) -> bool:
        """Whether so many rows are not finite that a loss scale is to blame: half."""
        return 2 * sum(not math.isfinite(x) for x in norms2) >= len(norms2)

    def private_copy(self) -> "Guard":
        """A copy that learns by itself; on_alarm is shared."""
        twin = copy.copy(self)
        twin._past = copy.deepcopy(self._past)
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What it has learned of the rows, as plain numbers."""
        return self._past.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for the state of another policy.
        """
        self._past.load_state_dict(state)

    def __repr__(self) -> str:
        # without on_alarm: ranks compare what they see here
        names = ("norm_ratio", "cosine_z", "cosine_every", "spike", "spike_z", "drift")
        return f"Guard({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def decision_without(
    broken: set[int | None], factor: float, cosines: Float64[Tensor, " k"]
) -> Decision:
    """The average of the rows that are not broken, times a factor; a skip if half are broken."""
    k, device = len(cosines), cosines.device
    kept = [i not in broken for i in range(k)]
    steps = 2 * sum(kept) > k and factor > 0
    weight = factor / sum(kept) if steps else 0.0
    return Decision(
        torch.tensor([weight * one for one in kept], dtype=torch.float64, device=device),
        torch.tensor([steps and one for one in kept], device=device),
        torch.tensor(steps, device=device),
        (1 - cosines).clamp(0, 2),
    )
