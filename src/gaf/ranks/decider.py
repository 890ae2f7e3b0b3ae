"""From the ranks' Gram matrix to a step or none: what every data-parallel engine calls.

    begin     a backward pass starts a decision                               pending
    settle    Gram matrix -> decision -> update in the engine's buffers       exchange
    end       a skip marks the parameters that the next step leaves alone     skips
    step()    of an optimizer: it moves, or skips; the decision counts        step_hooks, pending

An engine begins and ends each pass, and settles once in it, or once for each group of parameters.
"""

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gaf.ranks.exchange import Exchange
from gaf.ranks.judged import judge_seen, judge_unseen
from gaf.ranks.model_checks import raise_thawed
from gaf.ranks.optimizer_steps import parameters_of
from gaf.ranks.pending import PendingDecisions
from gaf.ranks.row_ledger import RowLedger
from gaf.ranks.skips import SkippedParameters
from gaf.ranks.stale import CLEAR_FIRST, IN_PART, StaleGradients
from gaf.ranks.step_hooks import StepHooks
from gaf.ranks.totals import Totals
from gaf.record.outcome import Outcome
from gaf.rules.averaging import averages, measures
from gaf.rules.contract import Policy, merge_of, tell_loss_scale
from gaf.rules.decision import Decision, as_skip, check_weights
from gaf.rules.judging import has_overflow
from gaf.rules.row_sums import RowSums


class Decider:
    """One policy's decisions on the gradients of one model.

    Args:
        params: those that are decided on.

    Attributes:
        summed_groups: the groups over whose ranks the coordinates are spread, and K is summed.
        outside: the model's parameters that no decision covers, with their names: they were frozen
            when the engine was made, and it would not average them.
        moves: whether the last pass's decision steps, or any of its groups'.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        policy: Policy,
        scaler: GradScaler | None,
        k: int,
        params: Sequence[Tensor],
    ) -> None:
        self.ledger = RowLedger(policy, k)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.k = k
        self.summed_groups: Sequence[dist.ProcessGroup] = []
        self.moves = True
        self.stale = StaleGradients(set(params), not averages(policy) or measures(policy))
        self.pending = PendingDecisions(self.ledger)
        self.skips = SkippedParameters()
        scaled = self.scaler is not None
        self.steps = StepHooks(optimizers, scaled, self._prepare_step, self.pending.count)
        self.totals = Totals(self.scaler)
        self.outside: dict[Tensor, str] = {}
        self._undo: list[Callable[[], None]] = [self.steps.remove]

    def on_detach(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def arrive(self, p: Tensor) -> None:
        """Before a backward pass adds to a parameter's gradient: an earlier skip of it is over."""
        self.stale.open()
        self.skips.discard(p)
        self.stale.look(p)

    def begin(self, joining: bool = False, joined: bool = False) -> int:
        """A pass's first decision is due.

        Args:
            joining: whether ranks may have joined (DDP.join): those that have are told whether the
                decision before was followed by a step.
            joined: whether this rank has: it has no more data, and the pass is that of the others.

        Returns:
            How many ranks of the first group have not joined; 0 if none may have.
        """
        self.stale.open()
        self.steps.begin_pass()
        active = self.pending.keep_or_drop(joining, joined, self.stale, self.summed_groups)
        several = bool(self.pending.passes)
        self.skips.begin_pass(several)
        self.moves = self.moves and several
        self.pending.begin_pass(joined)
        return active

    def end(self) -> None:
        """The pass's last decision is taken."""
        self.skips.end_pass(self.stale, several=len(self.pending.passes) > 1)
        reached = self.stale.reached_parameters()
        self.stale.close()
        self.steps.end_pass()
        self.pending.end_pass(reached)

    def settle(
        self, exchange: Exchange, params: Sequence[Tensor], groups: "Sequence[dist.ProcessGroup]"
    ) -> None:
        """Pieces on their way in -> Gram -> decision -> update on its way out.

        Args:
            exchange: what was sent.
            params: those that the pieces belong to.
            groups: those over whose ranks the coordinates are spread; the Gram matrix is added up
                over each in turn.
        """
        exchange.receive()
        products = self.sum_over_ranks(exchange.local_products(), groups)
        weights, filler = self.decide(exchange.seen_in(products), params)
        if weights is None:
            exchange.fill(filler)
        else:
            exchange.give_back(weights, merge_of(self.ledger.policy))
        exchange.end()

    def sum_over_ranks(self, partial: Tensor, groups: "Sequence[dist.ProcessGroup]") -> Tensor:
        """The sum of all ranks' shares, (...,) float64, on the host: an ordinary step's only wait.

        Raises:
            RuntimeError: on all ranks, if one of them began its backward pass on top of a part of
                the last update, and the policy does not simply average.
        """
        stale = self.stale.added_to_updates(self.steps.all_stepped())
        total = self.totals.add_up(partial, stale, groups)
        if not averages(self.ledger.policy):
            if self.totals.mixed >= IN_PART:
                raise RuntimeError(CLEAR_FIRST)
            self.pending.latest.stale |= self.totals.mixed > 0
        return total

    def decide(
        self, seen: Tensor | RowSums, params: Sequence[Tensor]
    ) -> tuple[list[float] | None, float]:
        """The decision about a Gram matrix, or about its diagonal and row sums.

        Returns:
            The weights; or None, and the number to write in place of an update: infinity after an
            overflow, for the scaler to see.
        """
        policy = self.ledger.policy
        tell_loss_scale(policy, self.totals.scale)
        decision, outcome = judge_seen(policy, seen)
        overflow = self.scaler is not None and has_overflow(policy, outcome.norms2)
        if averages(policy):
            outcome = self.totals.without_mixture(outcome)
            if isinstance(seen, RowSums):  # the average is there, whatever it holds
                self._record(decision, outcome, params)
                return outcome.weights, 0.0
        if overflow:
            decision, outcome = as_skip(decision), outcome.as_skip()
        check_weights(outcome.weights, outcome.stepped, policy)
        self.pending.latest.overflow |= overflow
        self._record(decision, outcome, params)
        if outcome.stepped:
            return outcome.weights, 0.0
        return None, float("inf") if overflow else 0.0

    def decide_unseen(self, params: Sequence[Tensor]) -> bool:
        """Whether to step, by a policy that looks at no row: Mean, RandomSkip."""
        decision, outcome = judge_unseen(self.ledger.policy, self.k)
        self._record(decision, outcome, params)
        return outcome.stepped

    def _record(self, decision: Decision, outcome: Outcome, params: Sequence[Tensor]) -> None:
        self.ledger.last, self.ledger.outcome = decision, outcome
        self.moves = self.moves or outcome.stepped
        self.pending.latest.outcomes.append((outcome, self.totals.scale))
        if not outcome.stepped:
            self.skips.add(params)
        if self.ledger.findings:
            waiting = sum(len(one.outcomes) for one in self.pending.passes)
            self.ledger.note_findings(self.totals.scale, waiting)

    def _prepare_step(self, optimizer: Optimizer) -> None:
        """Makes a step leave alone what it must.

        Raises:
            RuntimeError: if an update was in the gradients that were decided on.
            ValueError: if a parameter was thawed that the engine does not average.
        """
        if any(one.stale for one in self.pending.passes):
            raise RuntimeError(CLEAR_FIRST)
        for p, name in self.outside.items():
            if p.requires_grad and p.grad is not None:
                raise_thawed(name)
        self.skips.clear_gradients(parameters_of(optimizer))
