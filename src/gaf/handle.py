"""From the ranks' Gram matrix to a step or none: what every data-parallel engine shares, and what a user holds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaf.combine import Policy
from gaf.decision import Decision, Evidence
from gaf.exchange import Exchange, add_in_rank_order
from gaf.gate import gate
from gaf.policies import Mean, own, skipped
from gaf.rows import judged
from gaf.telemetry import Outcome, Telemetry


class Handle:
    """What `gaf.attach` returns: the decisions taken, and the way back.

    Attributes:
        last: the Decision of the last synchronised backward pass, on the CPU, the same on every rank; with
            scope="group" that of the group that came last. Its rows are the ranks, or the micro-groups of ranks.
        outcome: the same with its evidence, as plain numbers.
    """

    def __init__(
        self, optimizers: list[Optimizer], policy: Policy, scaler: GradScaler | None, k: int
    ) -> None:
        self.policy = own(policy)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.last: Decision | None = None
        self.outcome: Outcome | None = None
        self._k = k
        self._telemetry = Telemetry()
        self._rejected, self._absent = [0] * k, [0] * k
        self._scale = 1.0  # what the scaler multiplied the rows by
        # steps decided and steps taken since attach; unlike stats, not restored
        self._progress = (0, 0)
        self._moves = True  # whether any group of the step under way is stepped on
        self._still: set[Tensor] = set()  # what the next optimizer step must leave alone
        self._synced = False  # whether p.grad holds an update rather than this rank's own gradient
        # whether an update was still there when a backward pass began
        self._stale: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        for optimizer in optimizers:
            self._undo.append(optimizer.register_step_pre_hook(self._before_step).remove)

    # ------------------------------------------------------------------------------------------ for users

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        """Makes a scheduler that is stepped once after every optimizer step stand still on a skip. In place; returns it.

        Raises:
            TypeError: for ReduceLROnPlateau, and for what is no torch scheduler.
            RuntimeError: from the scheduler's step(), where it turns out to be stepped less often (per epoch).
        """
        return gate(scheduler, lambda: self._progress)

    def stats(self, b: float = 1) -> dict[str, Any]:
        """Plain numbers, the same on every rank: those of `gaf.Accumulator.stats`, and two lists.

        `rejected_per_row`, `absent_per_row`: for each rank (or micro-group), how often since attach. Under Mean and
        RandomSkip nothing is measured: distances and noise scale are NaN.

        Args:
            b: samples per row. With 1, `noise_scale` counts micro-batches.
        """
        return self._telemetry.stats(b) | {
            "rejected_per_row": list(self._rejected),
            "absent_per_row": list(self._absent),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and the policy's own state; no process group in it. The same on every rank."""
        policy = self.policy.state_dict() if hasattr(self.policy, "state_dict") else {}
        return {
            "telemetry": self._telemetry.state_dict(),
            "policy": policy,
            "rejected": list(self._rejected),
            "absent": list(self._absent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, also on another number of ranks; the counts per row then start anew."""
        self._telemetry.load_state_dict(state["telemetry"])
        if hasattr(self.policy, "load_state_dict"):
            self.policy.load_state_dict(state["policy"])
        if len(state["rejected"]) == self._k:
            self._rejected, self._absent = list(state["rejected"]), list(state["absent"])

    def detach(self) -> None:
        """Leaves plain averaging behind. Schedulers stay gated by what was decided until now; attach again to filter again."""
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------------------ for the engines

    def on_detach(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def before_accumulation(self, grad: Tensor | None) -> None:
        """Before a backward pass adds to a gradient: what is there must not be an update. Looked at when the step is decided."""
        if self._synced:
            self._synced = False
            if grad is not None:
                self._stale = (grad != 0).any()

    def begin(self) -> None:
        """A new step's first decision is due."""
        self._still, self._moves = set(), False

    def settle(
        self, exchange: Exchange, params: Sequence[Tensor], over: "Sequence[dist.ProcessGroup]"
    ) -> None:
        """Pieces on their way in -> Gram -> decision -> update on its way out.

        Args:
            exchange: what was sent.
            params: those that the pieces belong to.
            over: groups over whose ranks the coordinates are spread; the Gram matrix is added up over each in turn.
        """
        exchange.receive()
        gram = exchange.gram(self.total(exchange.partial(), over))
        weights, filler = self.judge(gram, params)
        if weights is None:
            exchange.fill(filler)
        else:
            exchange.give_back(weights)
        exchange.end()

    def total(self, partial: Tensor, over: "Sequence[dist.ProcessGroup]") -> Tensor:
        """Adds up what each rank knows, (...,) float64, onto the host: the one time that a step waits for the device.

        Raises:
            RuntimeError: on all ranks, where one of them began its backward pass on top of the last update.
        """
        # still None before the first scaled loss
        factor = None if self.scaler is None else self.scaler._scale
        scale = partial.new_ones(1) if factor is None else factor.to(partial).reshape(1)
        stale = partial.new_zeros(1) if self._stale is None else self._stale.to(partial).reshape(1)
        known, ranks = torch.cat([partial.reshape(-1), scale, stale]), 1
        for group in over:
            known = add_in_rank_order(known.to(partial.device), group)
            ranks *= dist.get_world_size(group)
        self._stale = None
        self._scale = float(known[-2]) / ranks
        if known[-1] > 0:
            raise RuntimeError("attach: the gradients must be cleared before a backward pass that synchronises; the last update was "
                               "still there and would mix with the new micro-gradients. Call optimizer.zero_grad() first, or accumulate "
                               "under `with model.no_sync():` (FSDP2: model.set_requires_gradient_sync(False)).")  # fmt: skip
        return known[:-2].view(partial.shape)

    def judge(self, gram: Tensor, params: Sequence[Tensor]) -> tuple[list[float] | None, float]:
        """The decision. Returns the weights, or None and what to put in place of an update: an overflow is for the scaler to see."""
        decision, evidence = judged(self.policy, gram)
        overflow = self.scaler is not None and not bool(gram.diagonal().isfinite().all())
        decision = skipped(decision) if overflow else decision
        outcome = Outcome.fetch(decision, evidence)
        self._record(decision, outcome, params)
        return (
            (outcome.weights, 0.0) if outcome.stepped else (None, float("inf") if overflow else 0.0)
        )

    def averaged(self, params: Sequence[Tensor]) -> None:
        """A step whose average an all-reduce has made already: Mean and its kin."""
        assert isinstance(self.policy, Mean)
        ones, unknown = (
            torch.ones(self._k, dtype=torch.bool),
            torch.full((self._k,), torch.nan, dtype=torch.float64),
        )
        decision = self.policy.conclude(ones, unknown)
        outcome = Outcome.fetch(decision, Evidence(unknown, unknown[0], unknown[0]))
        self._record(decision, outcome.unmeasured(), params)

    def _record(self, decision: Decision, outcome: Outcome, params: Sequence[Tensor]) -> None:
        self.last, self.outcome, self._synced = decision, outcome, True
        self._moves = self._moves or outcome.stepped
        if not outcome.stepped:
            self._still.update(params)
        self._telemetry.record(outcome, self.policy, scale=self._scale)
        for i, (accepted, distance) in enumerate(
            zip(outcome.accepted, outcome.distances, strict=False)
        ):
            self._absent[i] += distance != distance
            self._rejected[i] += distance == distance and not accepted

    def end(self) -> None:
        """The step's last decision was taken."""
        self._progress = (self._progress[0] + 1, self._progress[1] + self._moves)

    # ------------------------------------------------------------------------------------------ hooks

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A skip: without gradients every dense optimizer leaves its parameters and its state alone."""
        closure = kwargs.get("closure") or next((a for a in args[1:] if callable(a)), None)
        if closure is None:
            self._hold_still(optimizer)
            return None

        def filtered() -> Any:
            loss = closure()
            self._hold_still(optimizer)
            return loss

        return (args[0],), {**kwargs, "closure": filtered}

    def _hold_still(self, optimizer: Optimizer) -> None:
        if self._still:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p in self._still or not self._moves:
                        p.grad = None
