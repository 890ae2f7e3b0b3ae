"""What an Accumulator shows of its steps: decisions, alarms, statistics, and gated schedulers."""

from typing import Any

from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from gaf.device.checks import check_new_policy
from gaf.device.growing import GrowingBatch
from gaf.device.scaler import LossScaling
from gaf.record.ledger import Ledger
from gaf.record.outcome import Outcome
from gaf.rules.contract import Policy, private_copy
from gaf.rules.decision import Decision


class Recorded:
    """The read-only part of `gaf.Accumulator`, from its ledger.

    Attributes:
        ledger: what came of the steps.
    """

    subject: str
    _given: tuple[Any, str, Any]  # what a policy's scope goes with
    _scaling: LossScaling

    def __init__(self, ledger: Ledger, batch: GrowingBatch) -> None:
        self.ledger, self._batch = ledger, batch
        batch.check_policy(ledger.policy)

    @property
    def waiting(self) -> bool:
        """Whether micro-gradients wait for their step()."""
        raise NotImplementedError

    @property
    def policy(self) -> Policy:
        """What decides. A new one may be assigned between steps."""
        return self.ledger.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        check_new_policy(policy, self._given, self.waiting, self.subject)
        self._batch.check_policy(policy)
        self.ledger.policy = private_copy(policy)

    @property
    def scaler(self) -> GradScaler | None:
        """The scaler, if it is enabled."""
        return self._scaling.scaler

    @property
    def last(self) -> Decision | None:
        """The decision of the last step."""
        return self.ledger.last

    @property
    def outcome(self) -> Outcome | None:
        """The last decision with its evidence, as plain numbers."""
        return self.ledger.outcome

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """What the policy found wrong (`gaf.Guard`), a dict of plain numbers for each, in order.

        `step`, counted from 1; `row`, None for the whole step; `kind`; `value` and `expected`, None
        if not finite, over `steps` steps. The same within 100 steps of `last_step` only raises
        `count`. They are not part of the state.
        """
        return self.ledger.alarms.alarms

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        """Pauses a scheduler on skips. In place; returns it.

        The scheduler must be stepped once after every `step()`.

        Raises:
            TypeError: for ReduceLROnPlateau, and if it is not a torch scheduler.
            RuntimeError: from the scheduler's step(), where it turns out to be stepped less often
                (per epoch).
        """
        return self.ledger.gate(scheduler)

    def stats(self, b: float = 1) -> dict[str, float]:
        """Plain numbers.

        Totals since the start: `steps` decided, `stepped` of them, `micro_gradients` seen, and of
        these `accepted`, `rejected` and `absent` (zero, NaN or infinite; on a skipped step nothing
        counts as accepted).

        Over the last 100 steps: `acceptance`, share of the compared rows that were accepted;
        `distance_mean` and `distance_min`, cosine distances of the rows that were compared;
        `norm_dispersion`, standard deviation over mean of the micro-gradients' norms;
        `noise_scale`, the gradient noise scale B = tr(Sigma) / |g|^2 (McCandlish et al., arXiv
        1812.06162), in units of b. NaN where nothing was compared, infinite where no common
        direction can be made out. `tau`: the last step's, NaN for a policy without one.

        With `until`: `rows_mean`, micro-gradients per step, over the last 100 steps; `agreement`,
        r of `gaf.Agreement`; `signal_share`, the share of the last step's mean that is signal by
        that r. NaN before the first step.

        Args:
            b: samples per micro-batch. With 1, `noise_scale` counts micro-batches.
        """
        return self.ledger.stats(b) | self._batch.stats()
