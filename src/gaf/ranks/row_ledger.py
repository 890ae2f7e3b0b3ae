"""What came of the steps of ranks: a ledger that also counts for each row."""

import copy
from typing import Any

from gaf.record.ledger import Ledger
from gaf.record.outcome import Outcome
from gaf.record.workers import Workers
from gaf.rules.contract import Policy


class RowLedger(Ledger):
    """A ledger with counts for each rank, or micro-group of ranks.

    Attributes:
        rejected, absent: for each row, in how many steps it was left out, or had no gradient.
        workers: what each row showed over the last steps.
        progress: stays (0, 0); `StepHooks` counts the steps of each optimizer instead.
    """

    def __init__(self, policy: Policy, k: int) -> None:
        super().__init__(policy)
        self.rejected, self.absent = [0] * k, [0] * k
        self.workers = Workers(k)

    def count(self, outcome: Outcome, scale: float) -> None:
        """Adds one decision. scale: what the scaler multiplied the rows by."""
        self.telemetry.record(outcome, self.policy, scale=scale)
        self.workers.record(outcome)
        if outcome.measured:
            for i, (accepted, absent) in enumerate(
                zip(outcome.accepted, outcome.absences, strict=True)
            ):
                self.absent[i] += absent
                self.rejected[i] += not absent and not accepted

    def stats(self, b: float = 1) -> dict[str, Any]:
        """See `gaf.Handle.stats`."""
        rows = {"rejected_per_row": list(self.rejected), "absent_per_row": list(self.absent)}
        return super().stats(b) | self.telemetry.cosines() | rows

    def state_dict(self) -> dict[str, Any]:
        rows = {"rejected": list(self.rejected), "absent": list(self.absent)}
        return super().state_dict() | rows | {"workers": self.workers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; the counts per row only if the rows are as many."""
        super().load_state_dict(state)
        if len(state["rejected"]) == len(self.rejected):
            self.rejected, self.absent = list(state["rejected"]), list(state["absent"])
        if "workers" in state:
            self.workers.load_state_dict(state["workers"])

    def fork(self) -> "RowLedger":
        """A ledger with the same policy and the same counts, which may go on by themselves."""
        twin = super().fork()
        assert isinstance(twin, RowLedger)
        twin.rejected, twin.absent = list(self.rejected), list(self.absent)
        twin.workers = copy.deepcopy(self.workers)
        return twin


def check_handle_state(state: Any) -> None:
    wanted = ("telemetry", "policy", "rejected", "absent")
    sound = isinstance(state, dict) and all(name in state for name in wanted)
    if not sound or not all(isinstance(state[name], list) for name in ("rejected", "absent")):
        found = sorted(map(str, state)) if isinstance(state, dict) else repr(state)
        raise ValueError(
            f"Handle: the state must hold {', '.join(wanted)}, the last two as lists; got {found}. "
            "Load what handle.state_dict() gave, whole."
        )
