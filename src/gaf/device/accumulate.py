"""GAF on one device: micro-gradients one after the other in time, as in gradient accumulation."""

from collections.abc import Callable, Sequence
from functools import partial
from sys import getrefcount
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaf.checks import (
    check_loss,
    check_model,
    check_optimizers,
    check_parameters,
    check_reentrant,
    check_scope,
    check_state,
    check_types,
    check_voters,
    claim_scaler,
    layers_of,
    names_of,
    raise_untouched,
    raise_unusable,
)
from gaf.device.batchnorm import BatchNormStatistics
from gaf.device.placed import Placed
from gaf.device.rows import Layered, Stacked, Streamed, rows_for
from gaf.record.ledger import Ledger
from gaf.record.telemetry import Outcome
from gaf.rules.contract import Policy, check_policy, scope_of
from gaf.rules.decision import Decision, as_skip, check_weights
from gaf.rules.judging import has_overflow

Rows = Streamed | Stacked | Layered
LeaveOut = Callable[[str, nn.Parameter], bool]


class Accumulator:
    """Gradient accumulation that filters: k micro-gradients, one decision, a step or none.

        acc = gaf.Accumulator(optimizer, gaf.GAF(tau=0.97))
        for x, y in micro_batches:                # k of them; each loss is the mean over its own micro-batch
            acc.backward(loss_fn(model(x), y))
        decision = acc.step()

    Do not divide the loss by k. After a skip, parameters and optimizer state are bitwise what they were. BatchNorm
    statistics, random state and the position in the data are not taken back. Micro-gradients add up in float32 or wider:
    float16 and bfloat16 rows in float32, so that a buffer takes twice a gradient's memory there.

    An optimizer has one Accumulator whose micro-gradients wait: making a new one drops what waits in an older one, such
    as one that was interrupted. A micro-batch that raises does not count, and the macro-batch goes on without it.

    Args:
        optimizer: any dense torch.optim optimizer, or several that share one decision.
        policy: `gaf.GAF(...)`, `gaf.Mean()`, or any callable from a Gram matrix to a Decision. With
            `GAF(start="first")` (the default), Mean and RandomSkip the micro-gradients are added up as they come:
            one gradient-sized buffer more than plain accumulation, whatever k. Others keep all k.
        model: needed for bn="accepted"; also gives parameters their names in messages, in `layers` and in `leave_out`.
        scaler: a torch.amp.GradScaler. `backward` scales, `decide` unscales, `step` steps and updates it: give `backward` the
            plain loss, not `scaler.scale(loss)`. An overflow makes the scale fall and nothing steps.
        bn: "all": BatchNorm's running statistics move with every micro-batch, as in the released code;
            "accepted": only with accepted ones. Then each forward pass in training mode is followed by its backward(), and
            other forward passes are in evaluation mode.
        leave_out: called with (name, parameter); where it is true, the parameter does not take part in the decision.
            It is still updated, with the same weights. Names are the model's without those of wrappers (torch.compile,
            nn.DataParallel). It must be true for some parameter, and not for all.

    Raises:
        TypeError, ValueError: where an argument cannot be used; the message says what to use instead.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        policy: Policy,
        *,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        bn: Literal["all", "accepted"] = "all",
        leave_out: LeaveOut | None = None,
    ) -> None:
        self.optimizers = check_optimizers(optimizer, "Accumulator")
        self.ledger = Ledger(check_policy(policy, "Accumulator"))
        check_types(model, scaler, leave_out)
        check_scope(policy, model, bn, leave_out)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        # with scope="layer", of the last step, by the name of the module
        self.layers: dict[str, Decision] = {}
        self._model, self._leave_out = model, leave_out
        self._names = names_of(self.optimizers, model)
        check_model(model, bn, self._names)
        self._params: list[nn.Parameter] = []
        self._spare: list[Tensor | None] = []  # buffers of the last macro-batch
        # which trainable parameters got no gradient when the graph was last looked at
        self._missing: list[bool] | None = None
        self._rows: Rows | None = None
        self._decided: Decision | None = None
        self._placed = Placed(self.optimizers)  # what decide() has put into p.grad
        self._stepping = False  # whether an optimizer's step is this object's own
        self._left_out = False  # whether leave_out was ever true
        check_parameters(self._names, self._parameters())
        self._bn = BatchNormStatistics(model) if model is not None and bn == "accepted" else None
        for one in self.optimizers:
            take_over(one, self)
            finalize(self, one.register_step_pre_hook(partial(refuse_step, ref(self))).remove)

    @property
    def policy(self) -> Policy:
        """What decides. A new one may be assigned between steps."""
        return self.ledger.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.ledger.policy = policy

    @property
    def last(self) -> Decision | None:
        """Of the last step."""
        return self.ledger.last

    @property
    def outcome(self) -> Outcome | None:
        """The same with its evidence, as plain numbers."""
        return self.ledger.outcome

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Computes one micro-gradient. Runs the loss's backward pass for this optimizer's parameters only.

        Args:
            loss: scalar, the mean over its own micro-batch; neither divided by k nor scaled.
            retain_graph: as for torch's backward.

        Raises:
            RuntimeError: between `decide()` and `step()`; where a parameter already holds a gradient from elsewhere, where none
                gets one, or a hook takes one; for reentrant checkpointing; with bn="accepted" for a loss that is not of the
                last forward pass.
            TypeError, ValueError: for what is no loss of one number; for a sparse gradient.
        """
        if self._decided is not None:
            raise RuntimeError(
                "Accumulator: backward() came after decide(); call step() first, it ends the macro-batch."
            )
        check_loss(loss)
        if self.scaler is not None:
            claim_scaler(self.scaler, self)
        if self._bn is not None:
            self._bn.check(loss)
        rows = self._rows if self._rows is not None else self._begin()
        self._check_clean()
        try:
            self._micro_gradient(
                loss if self.scaler is None else self.scaler.scale(loss), rows, retain_graph
            )
        except BaseException:
            self._forget(rows)
            raise
        finally:
            self._clear()
        if self._bn is not None:
            self._bn.note()

    def _micro_gradient(self, loss: Tensor, rows: Rows, retain_graph: bool) -> None:
        """Runs the backward pass; each gradient goes to `rows` as soon as it is there."""

        taken: set[int] = set()

        def take(j: int, p: Tensor) -> None:  # autograd runs hooks without recording
            grad, p.grad = p.grad, None
            if grad is None or j in taken or grad.layout != torch.strided:
                raise_unusable(self._names[self._params[j]], grad)
            taken.add(j)
            rows.take(j, unshared(grad))

        trained = [(j, p) for j, p in enumerate(self._params) if p.requires_grad]
        if not trained:
            raise ValueError("Accumulator: the optimizer must hold at least one parameter that requires a gradient; all are frozen. "
                             "Set requires_grad on some of them.")  # fmt: skip
        hooks = [p.register_post_accumulate_grad_hook(partial(take, j)) for j, p in trained]
        try:
            torch.autograd.backward(loss, inputs=[p for _, p in trained], retain_graph=retain_graph)
        finally:
            for hook in hooks:
                hook.remove()
        missing = [p.requires_grad and not g for p, g in zip(self._params, rows.got, strict=True)]
        if not taken or self._missing is None or (any(missing) and missing != self._missing):
            check_reentrant(loss)
            if not taken:
                raise_untouched(self._names)
            self._missing = missing
        with torch.no_grad():
            rows.add()

    def _forget(self, rows: Rows) -> None:
        """Leaves no trace of a micro-batch whose backward pass failed."""
        rows.drop()
        if self._bn is not None:
            self._bn.settle([])
        if not self._rows:
            self._rows = None

    def decide(self) -> Decision:
        """Decides, and puts the update into p.grad, unscaled: the place to clip. After a skip every p.grad is None.

        Raises:
            RuntimeError: where no backward() came before.
        """
        if self._decided is None:
            if self._rows is None:
                raise RuntimeError("Accumulator: step() needs at least one backward() before it; got none since the last step. "
                                   "Call acc.backward(loss) for each micro-batch in place of loss.backward().")  # fmt: skip
            self._decided = self._decide(self._rows)
        return self._decided

    @torch.no_grad()
    def _decide(self, rows: Rows) -> Decision:
        decision, evidence = rows.decide()
        if isinstance(rows, Layered):
            self.layers = dict(zip(self._parts(), rows.decisions, strict=True))
        outcome = Outcome.fetch(decision, evidence)
        check_weights(outcome.weights, outcome.stepped, self.policy)
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        # a scale of 0 is what overflows in a row have left: nothing can be unscaled
        overflow = self.scaler is not None and (scale == 0 or has_overflow(outcome.norms2))
        if overflow:
            decision, outcome = as_skip(decision), outcome.skipped()
            self._skip_layers()
        if outcome.stepped:
            for p, grad in zip(self._params, rows.update(outcome.weights), strict=True):
                p.grad = None if grad is None else grad.to(grad_dtype(p) or grad.dtype)
        self._spare = rows.spare
        self._rows = None
        self._unscale(overflow)
        self._placed.note()
        self._settle(outcome, scale)
        return decision

    def _skip_layers(self) -> None:
        self.layers = {name: as_skip(one) for name, one in self.layers.items()}

    def step(self) -> Decision:
        """Steps the optimizer, or leaves it exactly as it was; then clears the gradients and ends the macro-batch.

        An exception ends the macro-batch too. `stats`, `last`, `outcome`, `layers` and gated schedulers then show a step that was
        not taken; what the policy and BatchNorm took from the decision stays, and so does what the optimizer had done by then.

        Raises:
            RuntimeError: where no backward() came before; where the update, or a part of it, is gone that decide() left.
        """
        decision = self.ledger.last = self.decide()
        try:
            if self.outcome is not None and self.outcome.stepped:
                self._placed.check(self._names)
                self._step()
        except BaseException:
            self._take_back()
            raise
        finally:
            self._end()
        return decision

    def _take_back(self) -> None:
        """The step that was decided is not taken: what has been counted of it is a skip."""
        self.ledger.take_back()
        self._skip_layers()

    def _end(self) -> None:
        """Ends the macro-batch after its decision."""
        self._clear()
        self._decided = None
        if self.scaler is not None:
            self.scaler.update()

    def _step(self) -> None:
        self._stepping = True
        try:
            for optimizer in self.optimizers:
                if self.scaler is None:
                    optimizer.step()
                elif has_gradients(optimizer):
                    self.scaler.step(optimizer)
        finally:
            self._stepping = False

    def discard(self) -> None:
        """Drops the macro-batch under way and its micro-gradients; for an epoch that is broken off. Does nothing else.

        Raises:
            RuntimeError: between `decide()` and `step()`: the decision is counted.
        """
        if self._decided is not None:
            raise RuntimeError(
                "Accumulator: discard() came after decide(), which counted the decision; call step()."
            )
        if self._bn is not None and self._rows is not None:
            self._bn.settle([])
            self._bn.begin()
        self._rows = None
        self._clear()

    def _give_way(self) -> None:
        """Another Accumulator was made for the optimizer: what waits in this one, interrupted and kept by a traceback, is dropped."""
        if self._decided is not None:
            self.ledger.last = self._decided
            self._take_back()
            self._end()
        elif self._rows is not None:
            self.discard()

    @property
    def waiting(self) -> bool:
        """Whether a macro-batch is under way: micro-gradients wait for their step()."""
        return self._rows is not None or self._decided is not None

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        """Makes a scheduler that is stepped once after every `step()` stand still on a skip. In place; returns it.

        Raises:
            TypeError: for ReduceLROnPlateau, and for what is no torch scheduler.
            RuntimeError: from the scheduler's step(), where it turns out to be stepped less often (per epoch).
        """
        return self.ledger.gate(scheduler)

    def stats(self, b: float = 1) -> dict[str, float]:
        """Plain numbers.

        Totals since the start: `steps` decided, `stepped` of them, `micro_gradients` seen, and of these `accepted`,
        `rejected` and `absent` (zero, NaN or infinite; on a skipped step nothing counts as accepted).

        Over the last 100 steps: `acceptance`, share of the compared rows that were accepted; `distance_mean` and
        `distance_min`, cosine distances of the rows that were compared;
        `norm_dispersion`, standard deviation over mean of the micro-gradients' norms; `noise_scale`, the gradient
        noise scale B = tr(Sigma) / |g|^2 (McCandlish et al., arXiv 1812.06162), in units of b. NaN where nothing was
        compared, infinite where no common direction can be made out. `tau`: the last step's, NaN for a policy without one.

        Args:
            b: samples per micro-batch. With 1, `noise_scale` counts micro-batches.
        """
        return self.ledger.stats(b)

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and the policy's own state. Between macro-batches only: rows are not saved.

        Raises:
            RuntimeError: where micro-gradients wait for their step().
        """
        self._check_idle("state_dict()")
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            RuntimeError: where micro-gradients wait for their step().
            ValueError: for what is no such state, or that of another policy; nothing is taken then.
        """
        self._check_idle("load_state_dict()")
        check_state(state)
        self.ledger.load_state_dict(state)

    def _check_idle(self, call: str) -> None:
        if self.waiting:
            raise RuntimeError(f"Accumulator: {call} must come between macro-batches; micro-gradients wait and would be lost. "
                               "Call step() first, or discard() to drop them.")  # fmt: skip

    def _parameters(self) -> list[nn.Parameter]:
        return [
            p
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        ]

    def _begin(self) -> Rows:
        """The parameters of one macro-batch: groups may have been added, layers thawed, since the last."""
        params = self._parameters()
        if len(params) != len(self._params) or any(
            p is not q for p, q in zip(params, self._params, strict=True)
        ):
            self._spare = [None] * len(params)
            self._names = names_of(self.optimizers, self._model)
            check_parameters(self._names, params)
        self._params = params
        self._check_clean()
        voters = [self._leave_out is None or not self._leave_out(self._names[p], p) for p in params]
        self._left_out = self._left_out or not all(voters)
        check_voters(
            voters, params, self._names, self._leave_out is None or self._left_out, self._model
        )
        self._rows = self._holder(voters, params[0].device)
        self._spare = [None] * len(params)
        return self._rows

    def _holder(self, voters: list[bool], device: torch.device) -> Rows:
        if scope_of(self.policy) != "layer":
            return rows_for(self.policy, voters, self._spare, device)
        layers = list(self._parts().values())
        parts = [([voters[j] for j in layer], [self._spare[j] for j in layer]) for layer in layers]
        return Layered(
            layers, [rows_for(self.policy, votes, spare, device) for votes, spare in parts]
        )

    def _parts(self) -> dict[str, list[int]]:
        """What decides for itself under scope="layer": by name, the parameters' indices."""
        return layers_of(self._params, self._names)

    def _check_clean(self) -> None:
        for p in self._params:
            if p.grad is not None:
                raise RuntimeError(f"Accumulator: parameter {self._names[p]!r} must have no gradient before backward(); it has one, from "
                                   "a loss.backward() elsewhere or a zero_grad(set_to_none=False). Give every loss of this "
                                   "optimizer to acc.backward(), and clear strays with optimizer.zero_grad().")  # fmt: skip

    def _clear(self) -> None:
        for p in self._params:
            p.grad = None

    def _unscale(self, overflow: bool) -> None:
        """Has the scaler look at every optimizer's update. A skip leaves it none to look at: it sees a stand-in."""
        if self.scaler is None:
            return
        for optimizer in self.optimizers:
            if has_gradients(optimizer):
                self.scaler.unscale_(optimizer)
            else:
                probe = next(
                    (
                        p
                        for group in optimizer.param_groups
                        for p in group["params"]
                        if p.requires_grad and p.numel()
                    ),
                    None,
                )
                if probe is None:
                    continue
                probe.grad = torch.full_like(
                    probe, float("inf") if overflow else 0.0, dtype=grad_dtype(probe)
                )
                self.scaler.unscale_(optimizer)
                probe.grad = None

    def _settle(self, outcome: Outcome, scale: float) -> None:
        self.ledger.record(outcome, scale)
        if self._bn is not None:
            self._bn.settle(outcome.accepted)
            self._bn.begin()


_users: WeakKeyDictionary[Optimizer, "WeakSet[Accumulator]"] = WeakKeyDictionary()


def take_over(optimizer: Optimizer, user: Accumulator) -> None:
    """Makes `user` the one whose micro-gradients wait: what waits in an older Accumulator of the optimizer is dropped."""
    users = _users.setdefault(optimizer, WeakSet())
    for older in users:
        older._give_way()
    users.add(user)


def refuse_step(user: "ref[Accumulator]", optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before every step of an optimizer: while micro-gradients wait, the step is the Accumulator's."""
    acc = user()
    if acc is not None and acc.waiting and not acc._stepping:
        raise RuntimeError(f"Accumulator: {type(optimizer).__name__}.step() must not be called while micro-gradients wait; it was. Call "
                           "acc.step() in its place: it decides, steps the optimizer or leaves it, and clears the gradients.")  # fmt: skip


def unshared(grad: Tensor) -> Tensor:
    """A gradient that may be written over: autograd can hand out one whose memory another tensor has too, and a hook can keep it."""
    kept = getrefcount(grad) > ALONE
    shared = torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > 2
    return grad.clone() if kept or shared else grad


def references(grad: Tensor) -> int:
    return getrefcount(grad)


def references_to_one_alone() -> int:
    """What `unshared` counts for a tensor that its caller alone holds: how many that is, depends on the version of Python."""
    grad = torch.empty(0, device="cpu")
    return references(grad)


ALONE = references_to_one_alone()


def grad_dtype(p: Tensor) -> torch.dtype | None:
    """What p.grad must have; None for any."""
    return getattr(p, "grad_dtype", p.dtype)


def has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
