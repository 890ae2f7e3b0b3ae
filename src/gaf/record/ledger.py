"""What came of the steps: the record that an Accumulator, a Handle and their like keep."""

import copy
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from gaf.record.alarms import Alarms
from gaf.record.gate import gate
from gaf.record.outcome import Outcome
from gaf.record.telemetry import Telemetry
from gaf.rules.contract import Policy, learned_state, load_learned_state, private_copy
from gaf.rules.decision import Decision, as_skip
from gaf.rules.finding import Finding, findings_of, on_alarm_of
from gaf.rules.judging import has_overflow


class Ledger:
    """A policy and what became of its decisions.

    Args:
        policy: what decides. What it learns here stays here: a policy that learns is copied.

    Attributes:
        policy: the copy.
        last: the Decision of the last step.
        outcome: the same with its evidence, as plain numbers.
        telemetry: counts since the start, and averages over the last steps.
        alarms: what the policy found wrong.
        progress: (steps decided, steps taken) by this object; unlike `stats`, not restored.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy: Policy = private_copy(policy)
        self.last: Decision | None = None
        self.outcome: Outcome | None = None
        self.telemetry = Telemetry()
        self.alarms = Alarms()
        self.progress = (0, 0)

    def record(self, outcome: Outcome, scale: float = 1.0) -> None:
        """Adds one step. scale: what a GradScaler multiplied the rows by."""
        decided, taken = self.progress
        self.outcome = outcome
        self.progress = (decided + 1, taken + outcome.stepped)
        self.telemetry.record(outcome, self.policy, scale=scale)

    @property
    def findings(self) -> list[Finding]:
        """What the policy noticed in its last decision."""
        return findings_of(self.policy)

    def note_findings(self, scale: float = 1.0, waiting: int = 0) -> None:
        """Alarms for what the policy found wrong in the last decision.

        Args:
            scale: what a GradScaler multiplied the rows by; an overflow by it is no alarm.
            waiting: decisions, the last one included, that are not counted yet.
        """
        assert self.outcome is not None
        if scale > 1 and has_overflow(self.policy, self.outcome.norms2):
            return
        self.alarms.note(
            self.findings,
            self.telemetry.totals["steps"] + waiting,
            self.outcome.stepped,
            on_alarm_of(self.policy),
        )

    def take_back(self) -> None:
        """The last step was not taken after all: it counts as a skip."""
        assert self.last is not None
        assert self.outcome is not None
        self.telemetry.take_back(self.outcome)
        decided, taken = self.progress
        self.progress = (decided, taken - self.outcome.stepped)
        self.last, self.outcome = as_skip(self.last), self.outcome.as_skip()

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        """Makes a scheduler stand still on a skip; see `gaf.Accumulator.gate`."""
        return gate(scheduler, lambda: self.progress)

    def stats(self, b: float = 1) -> dict[str, Any]:
        """See `gaf.Accumulator.stats`."""
        return self.telemetry.stats(b)

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and what the policy has learned."""
        learned = learned_state(self.policy)
        return {
            "telemetry": self.telemetry.state_dict(),
            "policy": {} if learned is None else learned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for what is no such state, or that of another policy; nothing is taken then.
        """
        before = learned_state(self.policy)
        load_learned_state(self.policy, state["policy"])
        try:
            self.telemetry.load_state_dict(state["telemetry"])
        except Exception:
            if before is not None:
                load_learned_state(self.policy, before)
            raise

    def fork(self) -> "Ledger":
        """A ledger with the same policy and the same counts, which may go on by themselves."""
        twin = copy.copy(self)
        twin.telemetry = copy.deepcopy(self.telemetry)
        return twin
