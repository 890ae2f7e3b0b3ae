"""What a user of gaf.attach holds: the decisions taken, and the way back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaf.ranks.decider import Decider
from gaf.ranks.row_ledger import check_handle_state
from gaf.ranks.stale import StaleGradients
from gaf.record.gate import gate, ungate
from gaf.record.outcome import Outcome
from gaf.rules.averaging import averages, measures
from gaf.rules.contract import Policy, check_policy, private_copy
from gaf.rules.decision import Decision


class Handle(Decider):
    """What `gaf.attach` returns: a Decider, whose begin, settle and end the hooks call.

    Attributes:
        last: the Decision of the last synchronised backward pass, on the CPU, the same on every
            rank; with scope="group" that of the group that came last. Its rows are the ranks, or
            the micro-groups of ranks.
        outcome: the same with its evidence, as plain numbers.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        policy: Policy,
        scaler: GradScaler | None,
        k: int,
        params: Sequence[Tensor],
        check: Callable[[Policy], None] = lambda policy: None,
    ) -> None:
        """check: raises if the engine cannot use a policy."""
        super().__init__(optimizers, policy, scaler, k, params)
        self._check = check

    @property
    def policy(self) -> Policy:
        """What decides.

        A new one may be assigned between steps, the same on all ranks; it is checked and copied as
        by `attach`.
        """
        return self.ledger.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        check_policy(policy, "handle.policy")
        self._check(policy)
        self.ledger.policy = private_copy(policy)
        self.stale.active = not averages(policy) or measures(policy)
        self.pending.forget_policy_states()

    @property
    def last(self) -> Decision | None:
        return self.ledger.last

    @property
    def outcome(self) -> Outcome | None:
        return self.ledger.outcome

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        """Makes a scheduler stand still on a skip, until `detach`.

        The scheduler must be stepped once after every step of its optimizer. It is changed in
        place, and returned.

        Raises:
            TypeError: for ReduceLROnPlateau, and if it is not a torch scheduler.
            ValueError: if the scheduler drives none of the handle's optimizers.
            RuntimeError: after detach; from the scheduler's step(), if it turns out to be stepped
                less often (per epoch).
        """
        if not self.attached:
            raise RuntimeError(
                "gate: the handle must be attached, because it follows the steps of its "
                "optimizers; it was detached. Attach again, and gate by the new handle."
            )
        progress = self.steps.progress_of(scheduler)
        gate(scheduler, progress)
        self.on_detach(partial(ungate, ref(scheduler), progress))
        return scheduler

    def stats(self, b: float = 1) -> dict[str, Any]:
        """Plain numbers, the same on every rank: those of `gaf.Accumulator.stats`, and others.

        `rejected_per_row`, `absent_per_row`: for each rank (or micro-group), how often since
        attach. `cosine_mean`, `cosine_min`: the rows' cosines to the sum of the others. Under
        `Mean()` and RandomSkip nothing is measured: distances, cosines and noise scale are NaN;
        under `Mean(measure_every=n)` averages are over the last 100 measured steps, and a row's
        distance is 1 - cosine. A decision counts when the optimizer steps on it, and an overflow
        when the next pass begins.

        Args:
            b: samples per row. With 1, `noise_scale` counts micro-batches.
        """
        return self.pending.known_ledger().stats(b)

    def workers(self) -> list[dict[str, Any]]:
        """A dict for each row, in their order, of plain numbers that are the same on every rank.

        `rank`, its global rank, and `host`, the name of that rank's machine; if a row is that of
        several ranks (micro-groups, sharded replicas), the lowest, and `ranks` has them all.

        Means over the last 100 measured steps, NaN before the first: `norm`, its gradient's norm
        over the median of all rows' norms; `cosine`, in [-1, 1], its gradient's cosine to the sum
        of the others'; `finite`, the share of the steps in which it was finite. Since attach:
        `left_out`, the steps that were taken without it.

        On a flat FSDP2 model under `Mean` the cosines stay unknown. A single step's cosine scatters
        by about 1 / sqrt(d_eff); a worker whose data or arithmetic are wrong shows in the means,
        beside the others'.
        """
        return self.pending.known_ledger().workers.table(self.ledger.alarms.workers or [])

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """What the policy found wrong (`gaf.Guard`), as `gaf.Accumulator.alarms` has it.

        `rank` and `host`, as in `workers`, stand in place of `row`; both are None for the whole
        step. The same on every rank.
        """
        return self.ledger.alarms.alarms

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and what the policy has learned, as of the last optimizer step.

        The same on every rank; no process group in it.
        """
        policy = self.pending.settled_policy_state() or {}
        return self.pending.known_ledger().state_dict() | {"policy": policy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, also on another number of ranks.

        On another number, the counts per row start anew.

        Raises:
            ValueError: for what is no such state, or that of another policy; nothing is taken then.
        """
        check_handle_state(state)
        self.ledger.load_state_dict(state)
        self.pending.passes = []

    def detach(self) -> None:
        """Returns to plain averaging, and frees the gated schedulers; attach again to filter again.

        A skip whose optimizer step is still to come holds.
        """
        self.skips.close(self.stale.params)
        while self._undo:
            self._undo.pop()()
        self.stale, self.outside = StaleGradients(set(), False), {}

    @property
    def attached(self) -> bool:
        return bool(self._undo)
