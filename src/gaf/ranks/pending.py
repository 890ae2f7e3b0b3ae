"""Decisions that wait for the optimizer step they belong to.

A decision counts when that step is done. A decision that no step follows, such as one about a pass
that only led through the model to another one (a GAN's generator step), counts nowhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.ranks.row_ledger import RowLedger
from gaf.ranks.stale import StaleGradients
from gaf.record.outcome import Outcome
from gaf.rules.contract import learned_state, load_learned_state


@dataclass
class PassDecisions:
    """What one pass decided: one outcome, or with scope="group" one for each group."""

    policy_state: Any  # from before the first of these decisions
    joined: bool = False  # whether this rank has joined: the others step
    reached: set[Tensor] = field(default_factory=set)  # by the pass on this rank
    outcomes: list[tuple[Outcome, float]] = field(default_factory=list)  # with the loss scale
    overflow: bool = False
    stale: bool = False  # whether an update was in the gradients that were decided on


class PendingDecisions:
    """The passes since the last optimizer step, of which the ledger has no count yet.

    Attributes:
        passes: more than one only if several passes share a step.
    """

    def __init__(self, ledger: RowLedger) -> None:
        self.ledger = ledger
        self.passes: list[PassDecisions] = []

    @property
    def latest(self) -> PassDecisions:
        return self.passes[-1]

    def begin_pass(self, joined: bool) -> None:
        self.passes.append(PassDecisions(learned_state(self.ledger.policy), joined))

    def end_pass(self, reached: set[Tensor]) -> None:
        self.latest.reached = reached
        if self.latest.overflow:  # no step will follow
            count_pass(self.ledger, self.passes.pop())

    def keep_or_drop(
        self,
        joining: bool,
        joined: bool,
        stale: StaleGradients,
        groups: "Sequence[dist.ProcessGroup]",
    ) -> int:
        """Drops decisions that no step has followed, unless their update still waits for one.

        It waits if several passes over different parameters share a step: then none of them is
        reached again, and their gradients are there. Each rank may have reached other parameters,
        so the ranks exchange their answers, if there is a question.

        Returns:
            How many ranks of the first group have not joined; 0 if none may have.
        """
        mine = [one for one in self.passes if not one.joined]  # passes that this rank took part in
        if not mine and not joining:
            self.count_joined()
            return 0
        before = set().union(*(one.reached for one in mine))
        again = bool(before & stale.reached_parameters())
        holds = any(p.grad is not None for p in before)
        answers = (not joined, bool(mine), again, holds)
        device = next(iter(stale.params)).device
        active, waiting, again_somewhere, held = count_ranks(answers, groups, device)
        if not waiting:  # the others have stepped
            self.count_joined()
        elif again_somewhere or not held:
            self.drop()
        return active

    def count(self, overflow: bool) -> None:
        """An optimizer has stepped: the decisions count."""
        for one in self.passes:
            one.overflow |= overflow
            count_pass(self.ledger, one)
        self.passes = []

    def count_joined(self) -> None:
        """Decisions of passes after this rank had joined: the others have stepped on them."""
        for one in self.passes:
            if one.joined:
                count_pass(self.ledger, one)
        self.passes = [one for one in self.passes if not one.joined]

    def drop(self) -> None:
        """No optimizer step followed these decisions: the policy forgets them."""
        for one in reversed(self.passes):
            if one.policy_state is not None:
                load_learned_state(self.ledger.policy, one.policy_state)
        self.passes = []

    def forget_policy_states(self) -> None:
        """The policy was replaced: what the former one had learned is of no use to the new one."""
        for one in self.passes:
            one.policy_state = None

    def known_ledger(self) -> RowLedger:
        """The counts as if the others had stepped on all decisions after this rank joined.

        This rank has not counted those steps yet.
        """
        joined = [one for one in self.passes if one.joined]
        if not joined:
            return self.ledger
        known = self.ledger.fork()
        for one in joined:
            count_pass(known, one)
        return known

    def settled_policy_state(self) -> Any:
        """From before the decisions that no optimizer step has followed yet."""
        for one in self.passes:
            if not one.joined and one.policy_state is not None:
                return one.policy_state
        return learned_state(self.ledger.policy)


def count_pass(ledger: RowLedger, decisions: PassDecisions) -> None:
    for outcome, scale in decisions.outcomes:
        ledger.count(outcome.as_skip() if decisions.overflow else outcome, scale)


def count_ranks(
    answers: Sequence[bool], groups: "Sequence[dist.ProcessGroup]", device: torch.device
) -> list[int]:
    """How many ranks of the first group answer yes to each question; this rank's `answers` count.

    The coordinates are spread over the ranks of all groups. A rank of the first group counts if any
    of its shards answers yes.
    """
    yes = torch.tensor(answers, dtype=torch.float32, device=device)
    for group in groups:
        dist.all_reduce(yes, group=group)
    for group in groups[1:]:  # each of the first group's ranks was counted so often
        yes /= dist.get_world_size(group)
    return [math.ceil(count) for count in yes.tolist()]
