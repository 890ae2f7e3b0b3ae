"""From the ranks' Gram matrix to a step or none: what every data-parallel engine shares, and what a user holds.

backward pass -> Gram -> decision, pending -> optimizer.step(): update or skip, and the decision counts

A decision belongs to the optimizer step that follows it. A decision that no step follows, such as one about a pass
that only led through the model to another one (a GAN's generator step), counts nowhere.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaf.ranks.exchange import Exchange
from gaf.ranks.messages import add_in_rank_order
from gaf.ranks.stale import CLEAR_FIRST, IN_PART, StaleGradients, is_set
from gaf.ranks.steps import fused_overflow, parameters_of, place_of_closure
from gaf.record.gate import gate, ungate
from gaf.record.ledger import Ledger
from gaf.record.telemetry import Outcome
from gaf.rules.contract import Policy, check_policy, learned_state, load_learned_state
from gaf.rules.decision import Decision, Evidence, as_skip, check_weights
from gaf.rules.judging import decide_with_evidence, has_overflow
from gaf.rules.policies import Mean, averages, private_copy


@dataclass
class Pending:
    """What was decided since the last optimizer step: one outcome, or with scope="group" one for each group."""

    policy_state: Any  # from before the first of these decisions
    joined: bool = False  # whether this rank has joined: the others step
    reached: set[Tensor] = field(default_factory=set)  # by the pass on this rank
    outcomes: list[tuple[Outcome, float]] = field(default_factory=list)  # with the loss scale
    overflow: bool = False
    stale: bool = False  # whether an update was in the gradients that were decided on


class Handle:
    """What `gaf.attach` returns: the decisions taken, and the way back.

    Attributes:
        last: the Decision of the last synchronised backward pass, on the CPU, the same on every rank; with
            scope="group" that of the group that came last. Its rows are the ranks, or the micro-groups of ranks.
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
        """params: those that are decided on. check: raises where the engine cannot use a policy."""
        self._check = check
        self.ledger = Ledger(policy)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._k = k
        self._outside: dict[Tensor, str] = {}  # frozen parameters that the engine would not average
        self._rejected, self._absent = [0] * k, [0] * k
        self._scale = 1.0  # what the scaler multiplied the rows by
        self._pending: list[Pending] = []  # more than one only where several passes share a step
        self._skipped: list[Tensor] = []  # parameters that this pass's decisions skip
        self._frozen: set[Tensor] = set()  # parameters that the next optimizer step must not move
        # Those that it must not move where their gradient is zero: an earlier pass of this step skipped them, and this rank
        # cannot see whether another rank's later pass has reached them.
        self._frozen_at_zero: set[Tensor] = set()
        # Per optimizer, its steps since attach and those of them that moved something; unlike stats, not restored.
        self._progress = dict.fromkeys(optimizers, (0, 0))
        self.over: Sequence[dist.ProcessGroup] = []  # that the coordinates are spread over
        # Steps in progress, for a step() may call its base class's, and closures that run.
        self._depth: dict[Optimizer, int] = {}
        self._closures = 0
        self._stepped: set[Optimizer] = set()  # since the last decision
        self.moves = True  # whether the last pass's decision steps, or any of its groups'
        self.stale = StaleGradients(set(params), not averages(policy))
        self._undo: list[Callable[[], None]] = []
        for optimizer in optimizers:
            self._undo.append(optimizer.register_step_pre_hook(self._before_step).remove)
            self._undo.append(optimizer.register_step_post_hook(self._after_step).remove)

    # ------------------------------------------------------------------------------------------ for users

    @property
    def policy(self) -> Policy:
        """What decides. A new one may be assigned between steps, the same on all ranks; it is checked and copied as by `attach`."""
        return self.ledger.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        check_policy(policy, "handle.policy")
        self._check(policy)
        self.ledger.policy = private_copy(policy)
        self.stale.active = not averages(policy)
        for pending in self._pending:
            pending.policy_state = None

    @property
    def last(self) -> Decision | None:
        return self.ledger.last

    @property
    def outcome(self) -> Outcome | None:
        return self.ledger.outcome

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        """Makes a scheduler that is stepped once after every step of its optimizer stand still on a skip, until `detach`.

        In place; returns it.

        Raises:
            TypeError: for ReduceLROnPlateau, and for what is no torch scheduler.
            ValueError: where the scheduler drives none of the handle's optimizers.
            RuntimeError: after detach; from the scheduler's step(), where it turns out to be stepped less often (per epoch).
        """
        if not self.attached:
            raise RuntimeError(
                "gate: the handle must be attached, for it follows the steps of its optimizers; it was detached. "
                "Attach again, and gate by the new handle."
            )
        progress = self._progress_of(scheduler)
        gate(scheduler, progress)
        self._undo.append(partial(ungate, ref(scheduler), progress))
        return scheduler

    def stats(self, b: float = 1) -> dict[str, Any]:
        """Plain numbers, the same on every rank: those of `gaf.Accumulator.stats`, and two lists.

        `rejected_per_row`, `absent_per_row`: for each rank (or micro-group), how often since attach. Under Mean and
        RandomSkip nothing is measured: distances and noise scale are NaN. A decision counts when the optimizer steps
        on it, and an overflow when the next pass begins.

        Args:
            b: samples per row. With 1, `noise_scale` counts micro-batches.
        """
        known = self._with_joined()
        return known.ledger.stats(b) | {
            "rejected_per_row": list(known._rejected),
            "absent_per_row": list(known._absent),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and the policy's own state as of the last optimizer step; no process group in it.

        The same on every rank.
        """
        known = self._with_joined()
        return known.ledger.state_dict() | {
            "policy": self._settled_policy_state() or {},
            "rejected": list(known._rejected),
            "absent": list(known._absent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, also on another number of ranks; the counts per row then start anew.

        Raises:
            ValueError: for what is no such state, or that of another policy; nothing is taken then.
        """
        check_handle_state(state)
        self.ledger.load_state_dict(state)
        if len(state["rejected"]) == self._k:
            self._rejected, self._absent = list(state["rejected"]), list(state["absent"])
        self._pending = []

    def detach(self) -> None:
        """Leaves plain averaging behind, and frees the gated schedulers; attach again to filter again.

        A skip whose optimizer step is still to come holds.
        """
        self._freeze([p for p in self.stale.params if p in self._frozen | self._frozen_at_zero])
        while self._undo:
            self._undo.pop()()
        self._progress, self.stale, self._outside = {}, StaleGradients(set(), False), {}
        self._depth, self._stepped, self._skipped = {}, set(), []

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    # ------------------------------------------------------------------------------------------ for the engines

    def on_detach(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def refuse_gradients(self, outside: dict[Tensor, str]) -> None:
        """outside: the model's parameters that no decision covers, with their names."""
        self._outside = outside

    def arrive(self, p: Tensor) -> None:
        """A backward pass is about to add to a parameter's gradient: a skip decided before is over for it."""
        self.stale.open()
        self._frozen.discard(p)
        self._frozen_at_zero.discard(p)
        self.stale.look(p)

    def begin(self, joining: bool = False, joined: bool = False) -> int:
        """A pass's first decision is due.

        Args:
            joining: whether ranks may have joined (DDP.join): those that have hear what became of the decision before.
            joined: whether this rank has: it has no more data, and the pass is that of the others.

        Returns:
            How many ranks of the first group have not joined; 0 where none may have.
        """
        self.stale.open()
        if not self._closures:
            self._depth.clear()  # of a step that an exception ended
        active = self._keep_or_drop(joining, joined)
        self.moves = self.moves and bool(self._pending)
        self._skipped = []
        self._pending.append(Pending(learned_state(self.policy), joined))
        return active

    def end(self) -> None:
        """The pass's last decision is taken."""
        waiting: set[Tensor] = set()
        if len(self._pending) > 1:
            waiting = {p for p in self._skipped if self.stale.waits(p)}
        self._frozen.update(p for p in self._skipped if p not in waiting)
        self._frozen_at_zero |= waiting
        pending = self._pending[-1]
        pending.reached = self.stale.reached()
        self.stale.close()
        self._stepped = set()
        if pending.overflow:  # no step will follow
            self._count(pending)
            self._pending.pop()

    def _keep_or_drop(self, joining: bool, joined: bool) -> int:
        """Decisions that no step has followed count no more, unless their update still waits for one.

        It does where several passes over different parameters share a step: then none of them is reached again, and their
        gradients are there. What a rank has reached is its own matter, so the ranks ask each other, where there is anything to ask.
        """
        mine = [one for one in self._pending if not one.joined]
        if not mine and not joining:
            self._count_joined()
            self._frozen, self._frozen_at_zero = set(), set()
            return 0
        before = set().union(*(one.reached for one in mine))
        again = bool(before & self.stale.reached())
        holds = any(p.grad is not None for p in before)
        active, waits, again_somewhere, held = self._tell(not joined, bool(mine), again, holds)
        if not waits:  # the others have stepped
            self._count_joined()
        elif again_somewhere or not held:
            self._drop()
        if not self._pending:
            self._frozen_at_zero = set()
        else:
            self._frozen_at_zero |= self._frozen
        self._frozen = set()
        return active

    def _tell(self, *mine: bool) -> list[int]:
        """How many ranks say so, of each."""
        device = next(iter(self.stale.params)).device
        told = torch.tensor(mine, dtype=torch.float32, device=device)
        for group in self.over:
            dist.all_reduce(told, group=group)
        for group in self.over[1:]:  # each of the first group's ranks was counted so often
            told /= dist.get_world_size(group)
        return [math.ceil(count) for count in told.tolist()]

    def _count_joined(self) -> None:
        """Decisions of passes after this rank had joined: the others have stepped on them."""
        for pending in [one for one in self._pending if one.joined]:
            self._count(pending)
            self._pending.remove(pending)

    def _with_joined(self) -> "Handle":
        """The counts as if the others had stepped on what this rank has not heard of yet; itself where there is none."""
        if not any(one.joined for one in self._pending):
            return self
        known = copy(self)
        known.ledger = self.ledger.fork()
        known._rejected, known._absent = list(self._rejected), list(self._absent)
        known._pending = list(self._pending)
        known._count_joined()
        return known

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
        gram = exchange.gram(self.total(exchange.partial_gram(), over))
        weights, filler = self.judge(gram, params)
        if weights is None:
            exchange.fill(filler)
        else:
            exchange.give_back(weights)
        exchange.end()

    def total(self, partial: Tensor, over: "Sequence[dist.ProcessGroup]") -> Tensor:
        """Adds up what each rank knows, (...,) float64, onto the host: the one time that a step waits for the device.

        Raises:
            RuntimeError: on all ranks, where one of them began its backward pass on top of a part of the last update.
        """
        scale = self._loss_scale(partial)
        found = self.stale.found(self._all_stepped())
        stale = partial.new_zeros(1) if found is None else found.to(partial).reshape(1)
        known, ranks = torch.cat([partial.reshape(-1), scale, stale]), 1
        for group in over:
            known = add_in_rank_order(known.to(partial.device), group)
            ranks *= dist.get_world_size(group)
        self._scale = float(known[-2]) / ranks
        if known[-1] >= IN_PART:
            raise RuntimeError(CLEAR_FIRST)
        self._pending[-1].stale |= bool(known[-1] > 0)
        return known[:-2].view(partial.shape)

    def _loss_scale(self, like: Tensor) -> Tensor:
        factor = None if self.scaler is None else self.scaler._scale  # None before the first loss
        return like.new_ones(1) if factor is None else factor.to(like).reshape(1)

    def judge(self, gram: Tensor, params: Sequence[Tensor]) -> tuple[list[float] | None, float]:
        """The decision. Returns the weights, or None and what to put in place of an update: an overflow is for the scaler to see."""
        decision, evidence = decide_with_evidence(self.policy, gram)
        outcome = Outcome.fetch(decision, evidence)
        overflow = self.scaler is not None and has_overflow(outcome.norms2)
        if overflow:
            decision, outcome = as_skip(decision), outcome.skipped()
        check_weights(outcome.weights, outcome.stepped, self.policy)
        self._pending[-1].overflow |= overflow
        self._decide(decision, outcome, params)
        if outcome.stepped:
            return outcome.weights, 0.0
        return None, float("inf") if overflow else 0.0

    def decide_unseen(self, params: Sequence[Tensor]) -> bool:
        """Whether to step, of a policy that looks at no row: Mean and its kin."""
        assert isinstance(self.policy, Mean)
        ones = torch.ones(self._k, dtype=torch.bool, device="cpu")
        unknown = torch.full((self._k,), torch.nan, dtype=torch.float64, device="cpu")
        decision = self.policy.conclude(ones, unknown)
        outcome = Outcome.fetch(decision, Evidence(unknown, unknown[0], unknown[0]))
        self._decide(decision, outcome.unmeasured(), params)
        return outcome.stepped

    def _decide(self, decision: Decision, outcome: Outcome, params: Sequence[Tensor]) -> None:
        self.ledger.last, self.ledger.outcome = decision, outcome
        self.moves = self.moves or outcome.stepped
        self._pending[-1].outcomes.append((outcome, self._scale))
        if not outcome.stepped:
            self._skipped += params

    def _all_stepped(self) -> list[list[Tensor]]:
        """The optimizers' parameters, where several have all stepped on the last update; else none."""
        if len(self._progress) < 2 or self._stepped != self._progress.keys():
            return []
        return [parameters_of(optimizer) for optimizer in self._progress]

    # ------------------------------------------------------------------------------------------ the step

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a step of an optimizer, or within one: where a subclass calls its base class's, both report."""
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1
        place = place_of_closure(type(optimizer), args, kwargs)
        if place is None:
            self._skip(optimizer)
            return None
        values: Any = kwargs if isinstance(place, str) else args
        filtered = partial(self._evaluate, optimizer, values[place])
        if isinstance(place, str):
            return args, {**kwargs, place: filtered}
        return (*args[:place], filtered, *args[place + 1 :]), kwargs

    def _evaluate(
        self, optimizer: Optimizer, closure: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._closures += 1
        try:
            loss = closure(*args, **kwargs)
        except BaseException:
            self._depth.clear()
            raise
        finally:
            self._closures -= 1
        self._skip(optimizer)
        return loss

    def _skip(self, optimizer: Optimizer) -> None:
        """A skip: without gradients every dense optimizer leaves its parameters and its state alone.

        Raises:
            RuntimeError: where an update was in the gradients that were decided on.
            ValueError: where a parameter was thawed that the engine does not average.
        """
        if any(pending.stale for pending in self._pending):
            self._depth.clear()
            raise RuntimeError(CLEAR_FIRST)
        for p, name in self._outside.items():
            if p.requires_grad and p.grad is not None:
                self._depth.clear()
                raise_thawed(name)
        if self._frozen or self._frozen_at_zero:
            self._freeze(parameters_of(optimizer))

    def _freeze(self, params: Sequence[Tensor]) -> None:
        for p in params:
            at_zero = p in self._frozen_at_zero and p.grad is not None and not bool(is_set(p))
            if p in self._frozen or at_zero:
                p.grad = None
        self._frozen.difference_update(params)
        self._frozen_at_zero.difference_update(params)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The step is done: its decision counts."""
        self._depth[optimizer] = max(self._depth.get(optimizer, 1) - 1, 0)
        if self._depth[optimizer]:
            return
        overflow = self.scaler is not None and fused_overflow(optimizer)
        moved = not overflow and any(p.grad is not None for p in parameters_of(optimizer))
        steps, taken = self._progress[optimizer]
        self._progress[optimizer] = (steps + 1, taken + moved)
        self._stepped.add(optimizer)
        for pending in self._pending:
            pending.overflow |= overflow
            self._count(pending)
        self._pending = []

    @property
    def stepping(self) -> bool:
        """Whether a step of one of the optimizers is in progress."""
        return any(self._depth.values())

    def drives(self, optimizer: Optimizer) -> bool:
        return optimizer in self._progress

    def _drop(self) -> None:
        """No optimizer step followed these decisions: they never were."""
        for pending in reversed(self._pending):
            if pending.policy_state is not None:
                load_learned_state(self.policy, pending.policy_state)
        self._pending = []

    def _count(self, pending: Pending) -> None:
        for outcome, scale in pending.outcomes:
            counted = outcome.skipped() if pending.overflow else outcome
            self.ledger.telemetry.record(counted, self.policy, scale=scale)
            pairs = zip(counted.accepted, counted.distances, strict=False)
            for i, (accepted, distance) in enumerate(pairs):
                self._absent[i] += distance != distance
                self._rejected[i] += distance == distance and not accepted

    def _settled_policy_state(self) -> Any:
        """From before the decisions that no optimizer step has followed yet."""
        states = [pending.policy_state for pending in self._pending if not pending.joined]
        before = next((state for state in states if state is not None), None)
        return learned_state(self.policy) if before is None else before

    def _progress_of(self, scheduler: Any) -> Callable[[], tuple[int, int]]:
        """Steps of the scheduler's optimizer, and those of them that moved something."""
        optimizer = getattr(scheduler, "optimizer", None)
        if optimizer not in self._progress:
            own = {p for one in self._progress for p in parameters_of(one)}
            theirs = parameters_of(optimizer) if isinstance(optimizer, Optimizer) else []
            if len(self._progress) > 1 or not own.intersection(theirs):
                raise ValueError(
                    "gate: the scheduler must drive one of the optimizers that were given to attach; "
                    f"its optimizer, a {type(optimizer).__name__}, is none of them. "
                    "Build the scheduler on one of those."
                )
            optimizer = next(iter(self._progress))
        return lambda: self._progress.get(optimizer, (0, 0))


def raise_thawed(name: str) -> None:
    raise ValueError(
        "attach: every trainable parameter must have been trainable when DistributedDataParallel was made, for it averages "
        f"no other; {name!r} was frozen then. Wrap the model again, then attach."
    )


def check_handle_state(state: Any) -> None:
    wanted = ("telemetry", "policy", "rejected", "absent")
    sound = isinstance(state, dict) and all(name in state for name in wanted)
    if not sound or not all(isinstance(state[name], list) for name in ("rejected", "absent")):
        found = sorted(map(str, state)) if isinstance(state, dict) else repr(state)
        raise ValueError(
            f"Handle: the state must hold {', '.join(wanted)}, the last two as lists; got {found}. "
            "Load what handle.state_dict() gave, whole."
        )
