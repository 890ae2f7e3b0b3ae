"""Guard: the average of all rows, unless one of them is broken; and which one it is."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gaf.arguments import ABOVE_0, real_number
from gaf.rules.contract import describe_state
from gaf.rules.decision import Decision
from gaf.rules.finding import Finding
from gaf.rules.gram import check_gram
from gaf.rules.history import History, medians_of_others
from gaf.rules.row_sums import RowSums
from gaf.shapes import Float64

WARM_UP = 20  # steps after which a row's own history counts
MEMORY = 100  # steps that a history looks back
LEAST_DEVIATION = 0.1  # of log norms: rows that never differed may differ by a tenth


class Guard:
    """Averages all rows as `Mean`, unless something is broken; and names what is.

    A row is broken if it is not finite, or if its norm is far from the others' and from its own
    past: more than `norm_ratio` times the median of the others' norms, and `norm_z` standard
    deviations above its own usual log norm, both relative to the others and by itself. During the
    first 20 steps, norm_ratio squared times the others' median is broken by itself. A broken row is
    left out of the average, and of what is learned. With half of the rows or more broken, the step
    is skipped. A row of zeros is not broken.

    Args:
        norm_ratio: above 1. Higher leaves out less.
        norm_z: above 0. Higher leaves out less.
        on_alarm: called with a dict for each new alarm, see `gaf.Accumulator.alarms`.

    Attributes:
        findings: what was noticed in the last decision.

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
        norm_z: float = 6.0,
        on_alarm: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.norm_ratio = real_number(
            "Guard: norm_ratio", norm_ratio, 1 + 1e-9, math.inf, "10 is the default."
        )
        self.norm_z = real_number("Guard: norm_z", norm_z, ABOVE_0, math.inf, "6 is the default.")
        if on_alarm is not None and not callable(on_alarm):
            raise TypeError(
                f"Guard: on_alarm must be callable with one dict; got {on_alarm!r}. "
                "Give a function such as print."
            )
        self.on_alarm = on_alarm
        self.findings: list[Finding] = []
        self._histories = {
            "norm": History(MEMORY, LEAST_DEVIATION),
            "relative norm": History(MEMORY, LEAST_DEVIATION),
        }

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        """Decides from the Gram matrix, (k, k) float64, of which it needs the row sums."""
        check_gram(gram)
        return self.judge(RowSums.of_gram(gram))

    def judge(self, sums: RowSums) -> Decision:
        """Decides from what a plain all-reduce shows. Waits for the device."""
        norms2 = sums.norms2.tolist()
        self.findings = [*find_not_finite(norms2), *self._find_long(norms2)]
        broken = {finding.row for finding in self.findings}
        return decision_without(broken, 1.0, sums.cosines)

    def _find_long(self, norms2: list[float]) -> list[Finding]:
        """Rows whose norm is broken; learns from the others."""
        norms = [0.5 * math.log(x) if 0 < x < math.inf else math.nan for x in norms2]
        usual = medians_of_others(norms)
        relative = [norm - other for norm, other in zip(norms, usual, strict=True)]
        seen = {"norm": norms, "relative norm": relative}
        far = self._are_far(seen)
        for name, history in self._histories.items():
            kept = [math.nan if out else x for out, x in zip(far, seen[name], strict=True)]
            history.learn(kept)
        return [
            Finding(i, "norm", math.exp(norms[i]), math.exp(usual[i]))
            for i, out in enumerate(far)
            if out
        ]

    def _are_far(self, seen: dict[str, list[float]]) -> list[bool]:
        relative, limit = seen["relative norm"], math.log(self.norm_ratio)
        for history in self._histories.values():
            history.fit(len(relative))
        if self._histories["norm"].seen < WARM_UP:
            return [x > 2 * limit for x in relative]
        scores = [history.scores(seen[name]) for name, history in self._histories.items()]
        pairs = zip(relative, *scores, strict=True)
        return [x > limit and min(both) > self.norm_z for x, *both in pairs]

    def overflowed(self, norms2: Sequence[float]) -> bool:
        """Whether so many rows are not finite that a GradScaler's scale is to blame: half."""
        return 2 * sum(not math.isfinite(x) for x in norms2) >= len(norms2)

    def private_copy(self) -> "Guard":
        """A copy that learns by itself; on_alarm is shared."""
        twin = copy.copy(self)
        twin._histories = copy.deepcopy(self._histories)
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What it has learned of the rows, as plain numbers."""
        return {name: history.state_dict() for name, history in self._histories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for the state of another policy.
        """
        if not isinstance(state, dict) or state.keys() != self._histories.keys():
            raise ValueError(
                f"Guard: the state must be of a Guard; it holds {describe_state(state)}. "
                "Build the policy as it was when it was saved."
            )
        for name, history in self._histories.items():
            history.load_state_dict(state[name])

    def __repr__(self) -> str:
        # without on_alarm: ranks compare what they see here
        return f"Guard(norm_ratio={self.norm_ratio:g}, norm_z={self.norm_z:g})"


def find_not_finite(norms2: Sequence[float]) -> list[Finding]:
    return [
        Finding(i, "not finite", value, math.nan)
        for i, value in enumerate(norms2)
        if not math.isfinite(value)
    ]


def decision_without(
    broken: set[int | None], factor: float, cosines: Float64[Tensor, " k"]
) -> Decision:
    """The average of the rows that are not broken, times a factor; a skip if half are."""
    k = len(cosines)
    kept = [i not in broken for i in range(k)]
    steps = 2 * sum(kept) > k and factor > 0
    weight = factor / sum(kept) if steps else 0.0
    device = cosines.device
    return Decision(
        torch.tensor([weight * one for one in kept], dtype=torch.float64, device=device),
        torch.tensor([steps and one for one in kept], device=device),
        torch.tensor(steps, device=device),
        (1 - cosines).clamp(0, 2),
    )
