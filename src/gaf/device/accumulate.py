"""GAF on one device: micro-gradients one after the other in time, as in gradient accumulation."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gaf.checks import check_optimizers
from gaf.device.backward import BackwardPass
from gaf.device.batchnorm import BatchNormStatistics
from gaf.device.checks import (
    check_accumulator_state,
    check_bn,
    check_idle,
    check_loss,
    check_scope,
    check_types,
    check_undecided,
    raise_nothing_waits,
)
from gaf.device.claims import claim_optimizer
from gaf.device.growing import GrowingBatch, check_until
from gaf.device.layers import LayeredRows, layered_rows_for, layers_of
from gaf.device.parameters import LeaveOut, Parameters
from gaf.device.placed import PlacedUpdate
from gaf.device.recorded import Recorded
from gaf.device.rows import StreamedRows, rows_for
from gaf.device.scaler import LossScaling
from gaf.device.stacked import StackedRows
from gaf.record.ledger import Ledger
from gaf.record.outcome import Outcome
from gaf.rules.contract import Policy, check_policy, scope_of, tell_loss_scale
from gaf.rules.decision import Decision, as_skip, check_weights
from gaf.rules.enough import Agreement
from gaf.rules.second_moments import roots_of

Rows = StreamedRows | StackedRows | LayeredRows


class Accumulator(Recorded):
    """Gradient accumulation that filters: k micro-gradients, one decision, a step or none.

        acc = gaf.Accumulator(optimizer, gaf.GAF(tau=0.97))
        for x, y in micro_batches:                # k of them; each loss is a micro-batch's mean
            acc.backward(loss_fn(model(x), y))
        decision = acc.step()

    Do not divide the loss by k. After a skip, parameters and optimizer state are bitwise what they
    were. BatchNorm statistics, random state and the position in the data are not taken back.
    Micro-gradients add up in float32 or wider: float16 and bfloat16 rows in float32, so that a
    buffer takes twice a gradient's memory there.

    Only one Accumulator per optimizer can have pending micro-gradients. A new one drops those of an
    older one, such as one that was interrupted. A micro-batch that raises does not count, and the
    macro-batch goes on without it.

    Args:
        optimizer: any dense torch.optim optimizer, or several that share one decision.
        policy: `gaf.GAF(...)`, or any callable from a Gram matrix to a Decision or to weights.
            With `GAF(start="first")` (the default), Mean and RandomSkip the micro-gradients are
            added up as they come: one gradient-sized buffer more than plain accumulation, whatever
            k. Others keep all k; on a CPU the memory of k - 1 stays from step to step.
        model: needed for bn="accepted"; also gives parameters their names in messages, in `layers`
            and in `leave_out`.
        scaler: a torch.amp.GradScaler. `backward` scales, `decide` unscales, `step` steps and
            updates it: give `backward` the plain loss, not `scaler.scale(loss)`. An overflow makes
            the scale fall and nothing steps.
        bn: "all": BatchNorm's running statistics move with every micro-batch, as in the released
            code; "accepted": only with accepted ones. Then each forward pass in training mode is
            followed by its backward(), and other forward passes are in evaluation mode.
        leave_out: called with (name, parameter); where it is true, the parameter does not take part
            in the decision. It is still updated, with the same weights. Names are the model's
            without those of wrappers (torch.compile, nn.DataParallel). It must be true for some
            parameter, and not for all.
        until: ends macro-batches, by `enough`, once they agree (`gaf.Agreement`). The policy is
            then one that drops nothing: `gaf.Mean()`.

    Attributes:
        layers: with scope="layer", the last step's Decision of each layer, by its module's name.

    Raises:
        TypeError, ValueError: where an argument cannot be used; the message says what to use
            instead.
    """

    subject = "Accumulator"  # of messages

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        policy: Policy,
        *,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        bn: Literal["all", "accepted"] = "all",
        leave_out: LeaveOut | None = None,
        until: Agreement | None = None,
    ) -> None:
        self.optimizers = check_optimizers(optimizer, self.subject)
        check_until(until, self.subject)
        ledger = Ledger(check_policy(policy, self.subject))
        super().__init__(ledger, GrowingBatch(until, self.optimizers, self.subject))
        check_types(model, scaler, leave_out, self.subject)
        self._given = model, bn, leave_out
        check_scope(scope_of(policy), *self._given)
        check_bn(bn, model)
        self._params = Parameters(self.optimizers, model, leave_out, self.subject)
        self.layers: dict[str, Decision] = {}
        self._rows: Rows | None = None  # of the macro-batch in progress
        self._decided: Decision | None = None
        self._backward = BackwardPass()
        self._scaling = LossScaling(scaler, self.optimizers)
        self._bn = BatchNormStatistics(model if bn == "accepted" else None)
        self._placed = PlacedUpdate(self.optimizers)  # what decide() has put into p.grad
        self._stepping = False  # whether an optimizer's step is this object's own
        for one in self.optimizers:
            claim_optimizer(one, self)

    @property
    def enough(self) -> bool:
        """Whether a step is due: by `until`, or because the macro-batch is decided.

        Raises:
            RuntimeError: without `until`.
        """
        return self._batch.is_enough(self._rows) or self._decided is not None

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Computes one micro-gradient: the loss's backward pass for this optimizer's parameters.

        Args:
            loss: scalar, the mean over its own micro-batch; neither divided by k nor scaled.
            retain_graph: as for torch's backward.

        Raises:
            RuntimeError: between `decide()` and `step()`; where a parameter already holds a
                gradient from elsewhere, where none gets one, or a hook takes one; for reentrant
                checkpointing; with bn="accepted" for a loss that is not of the last forward pass.
            TypeError, ValueError: for what is no loss of one number; for a sparse gradient.
        """
        check_undecided(self._decided, "backward()", self.subject)
        check_loss(loss)
        self._scaling.claim(self)
        self._bn.check(loss)
        rows = self._rows_in_progress()
        try:
            scaled = self._scaling.scale(loss)
            row = self._backward.run(scaled, self._params, retain_graph)
            with torch.no_grad():
                rows.add(row)
        except BaseException:
            self._params.clear()
            self._forget(rows)
            raise
        self._bn.note()

    def _rows_in_progress(self) -> Rows:
        """The holder of the macro-batch's rows; a new one where a macro-batch begins."""
        if self._rows is None:
            self._params.refresh()
        self._params.check_clean()
        if self._rows is None:
            self._rows = self._make_rows()
        return self._rows

    def _make_rows(self) -> Rows:
        params, voters = self._params.current, self._params.voters()
        roots = roots_of(self.policy, self.optimizers, params, voters)
        if scope_of(self.policy) != "layer":
            return rows_for(self.policy, voters, params, roots)
        return layered_rows_for(self.policy, self._layers(), voters, params, roots)

    def _layers(self) -> dict[str, list[int]]:
        """What scope="layer" decides on by itself: parameters' indices, by name."""
        return layers_of(self._params.current, self._params.names)

    def _forget(self, rows: Rows) -> None:
        """Leaves no trace of a micro-batch whose backward pass failed."""
        self._bn.settle([])
        if len(rows) == 0:
            self._rows = None

    def decide(self) -> Decision:
        """Decides, and puts the update into p.grad, unscaled: the place to clip.

        After a skip every p.grad is None. An exception, such as the policy's, ends the macro-batch.

        Raises:
            RuntimeError: where no backward() came before.
        """
        if self._decided is None:
            if self._rows is None:
                raise_nothing_waits(self.subject)
            try:
                self._decided = self._decide(self._rows)
            except BaseException:
                self._drop()
                raise
            if self.ledger.findings:
                self.ledger.note_findings(self._scaling.factor)
        return self._decided

    @torch.no_grad()
    def _decide(self, rows: Rows) -> Decision:
        scale = self._scaling.factor
        tell_loss_scale(self.policy, scale)
        decision, evidence = rows.decide()
        if isinstance(rows, LayeredRows):
            self.layers = rows.decisions
        outcome = Outcome.fetch(decision, evidence)
        check_weights(outcome.weights, outcome.stepped, self.policy)
        overflow = self._scaling.has_overflowed(self.policy, outcome.norms2, scale)
        if overflow:
            decision, outcome = as_skip(decision), outcome.as_skip()
            self._skip_layers()
        if outcome.stepped:
            self._params.place(rows.update(outcome.weights))
        self._backward.spare = rows.spare() if isinstance(rows, StackedRows) else []
        self._batch.learn(rows, scale)
        self._rows = None
        self._scaling.unscale(overflow)
        self._placed.note()
        self.ledger.record(outcome, scale)
        self._bn.settle(outcome.accepted)
        self._bn.begin()
        return decision

    def _skip_layers(self) -> None:
        self.layers = {name: as_skip(one) for name, one in self.layers.items()}

    def step(self) -> Decision:
        """Steps the optimizer, or leaves it exactly as it was.

        Then clears the gradients and ends the macro-batch. An exception ends the macro-batch too.
        `stats`, `last`, `outcome`, `layers` and gated schedulers then show a step that was not
        taken. What the policy and BatchNorm took from the decision stays, and so does what the
        optimizer had done by then.

        Raises:
            RuntimeError: where no backward() came before; where the update, or a part of it, that
                decide() left is gone.
        """
        decision = self.ledger.last = self.decide()
        try:
            if self.outcome is not None and self.outcome.stepped:
                self._placed.check(self._params.names, self.subject)
                self._step()
        except BaseException:
            self._take_back()
            raise
        finally:
            self._end()
        return decision

    def _step(self) -> None:
        self._stepping = True
        try:
            with self._batch.scaled_rates():
                self._scaling.step()
        finally:
            self._stepping = False

    def _take_back(self) -> None:
        """Counts the decided step as a skip, because it is not taken."""
        self.ledger.take_back()
        self._skip_layers()

    def _end(self) -> None:
        """Ends the macro-batch after its decision."""
        self._params.clear()
        self._decided = None
        self._scaling.update()

    def discard(self) -> None:
        """Drops the macro-batch in progress and its micro-gradients, as after an interrupted epoch.

        Clears every p.grad, takes back BatchNorm's moves under bn="accepted", and counts nothing.

        Raises:
            RuntimeError: between `decide()` and `step()`: the decision is counted.
        """
        check_undecided(self._decided, "discard()", self.subject)
        self._drop()

    def _drop(self) -> None:
        if self._rows is not None:
            self._bn.settle([])
            self._bn.begin()
        self._rows = None
        self._params.clear()

    def _give_way(self) -> None:
        """Drops what waits, because another Accumulator was made for the optimizer."""
        if self._decided is not None:
            self.ledger.last = self._decided
            self._take_back()
            self._end()
        elif self._rows is not None:
            self.discard()

    @property
    def waiting(self) -> bool:
        """Whether a macro-batch is in progress: micro-gradients wait for their step()."""
        return self._rows is not None or self._decided is not None

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and the policy's own state. Between macro-batches only: no rows in it.

        Raises:
            RuntimeError: where micro-gradients wait for their step().
        """
        check_idle(self.waiting, "state_dict()", self.subject)
        return self.ledger.state_dict() | self._batch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            RuntimeError: where micro-gradients wait for their step().
            ValueError: for what is no such state, or that of another policy; nothing is taken then.
        """
        check_idle(self.waiting, "load_state_dict()", self.subject)
        check_accumulator_state(state, self.subject)
        self._batch.check_state(state)
        self.ledger.load_state_dict(state)
        self._batch.load_state_dict(state)
