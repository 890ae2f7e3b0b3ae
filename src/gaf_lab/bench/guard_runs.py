"""One run of `gaf bench guard`: how it steps, what goes wrong in it, and what was reported."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import gaf
from gaf.record.alarms import Alarms
from gaf.rules.combine import combine
from gaf.rules.contract import Policy, judges_sums, merge_of, needs_cosines
from gaf.rules.decision import check_decision
from gaf.rules.finding import findings_of
from gaf.rules.merging import merge_into
from gaf.rules.row_sums import RowSums
from gaf_lab.bench.guard_faults import CLEAN

GUARDED_WAYS: dict[str, Callable[[], Policy]] = {
    "Mean": gaf.Mean,
    "Guard": gaf.Guard,
    "GAF": lambda: gaf.GAF(0.97),
    "Median": gaf.Median,
}


def judge(policy: Policy, gram: Tensor) -> Any:
    """What a policy decides. Guard sees as much of K as under `gaf.attach`."""
    if not judges_sums(policy):
        return policy(gram)
    sums = RowSums.of_gram(gram)
    if not needs_cosines(policy):
        sums = replace(sums, inner=torch.full_like(sums.inner, math.nan))
    return policy.judge(sums)  # type: ignore[attr-defined]


def update_of(rows: Tensor, weights: Tensor, policy: Policy) -> Tensor:
    """rows: (k, n)."""
    merge = merge_of(policy)
    if merge is None:
        return combine(weights, rows)
    update = torch.empty_like(rows[0])
    merge_into(update, list(rows), weights.tolist(), merge)
    return update


@dataclass
class GuardedRun:
    """One run: how it steps, what goes wrong, and what was reported."""

    way: str
    seed: int
    fault: str
    policy: Policy
    book: Alarms = field(default_factory=Alarms)

    def bad(self, k: int) -> int:
        """The worker that goes wrong."""
        return self.seed % k

    def fork(self, fault: str) -> "GuardedRun":
        """A run that goes on from here, with another fault."""
        policy, book = copy.deepcopy((self.policy, self.book))
        return GuardedRun(self.way, self.seed, fault, policy, book)

    def decide(self, rows: Tensor, gram: Tensor, step: int) -> tuple[Tensor, bool]:
        """The update, and whether to step. rows: (k, n)."""
        if self.way == "Mean":
            return rows.mean(0), True
        decision = check_decision(judge(self.policy, gram), self.policy, len(rows), gram.device)
        self.book.note(findings_of(self.policy), step)
        return update_of(rows, decision.weights, self.policy), bool(decision.stepped)

    def right_alarms(self, k: int, before: int) -> list[dict[str, Any]]:
        """Of the worker that went wrong after `before` steps."""
        return [alarm for alarm in self.book.alarms if self._is_right(alarm, k, before)]

    def wrong_alarms(self, k: int, before: int) -> list[dict[str, Any]]:
        """All others."""
        return [alarm for alarm in self.book.alarms if not self._is_right(alarm, k, before)]

    def _is_right(self, alarm: dict[str, Any], k: int, before: int) -> bool:
        return self.fault != CLEAN and alarm["row"] == self.bad(k) and alarm["step"] > before
