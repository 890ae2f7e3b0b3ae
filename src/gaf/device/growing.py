"""A macro-batch that ends by itself: the part that `until=gaf.Agreement(...)` has in a step."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gaf.rules.averaging import averages
from gaf.rules.contract import Policy
from gaf.rules.enough import Agreement, PairMeans
from gaf.rules.second_moments import check_metric


class GrowingBatch:
    """Asks an Agreement whether a macro-batch is large enough, and tells it each step's rows.

    Args:
        until: what is asked; None where the user ends macro-batches, and then nothing is done.
        optimizers: whose learning rates it may scale.
        subject: of messages.
    """

    def __init__(
        self, until: Agreement | None, optimizers: Sequence[Optimizer], subject: str = "Accumulator"
    ) -> None:
        self.until = None if until is None else until.private_copy()
        self.optimizers, self.subject = optimizers, subject
        self.size = 0  # rows of the step at hand

    def check_policy(self, policy: Policy) -> None:
        """Refuses a policy that may drop rows, and one whose metric the optimizers do not have."""
        check_metric(policy, self.optimizers, self.subject)
        if self.until is not None and not averages(policy):
            raise ValueError(
                f"{self.subject}: until goes with a policy that averages all micro-gradients; got "
                f"{policy!r}. Use gaf.Mean(), or leave until out."
            )

    def is_enough(self, rows: Any) -> bool:
        """Whether the macro-batch in progress is large enough; rows: it has none if None."""
        if self.until is None:
            raise RuntimeError(
                f"{self.subject}: enough needs a rule by which a macro-batch is large enough; "
                "until is None. Pass until=gaf.Agreement(rho=0.7, at_most=64), or count "
                "micro-batches."
            )
        return rows is not None and self.until.suffices(len(rows), rows.pair_means)

    def learn(self, rows: Any, scale: float) -> None:
        """Takes in the rows of a step, which were multiplied by `scale`."""
        self.size = len(rows)
        if self.until is not None:
            between, own = rows.pair_means()
            unit = scale**2 or 1.0
            self.until.learn(self.size, PairMeans(between / unit, own / unit))

    @contextlib.contextmanager
    def scaled_rates(self) -> Iterator[None]:
        """The learning rates of a step on the rows at hand; afterwards they are as before."""
        factor = 1.0 if self.until is None else self.until.factor(self.size)
        if factor == 1:
            yield
            return
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        before = [copy_rate(group["lr"]) for group in groups]
        try:
            for group, rate in zip(groups, before, strict=True):
                set_rate(group, rate * factor)
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                set_rate(group, rate)

    def stats(self) -> dict[str, float]:
        return {} if self.until is None else self.until.stats()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.until is None else {"until": self.until.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError for what `load_state_dict` cannot take, before anything is taken."""
        if ("until" in state) != (self.until is not None):
            saved, here = ("with", "has none") if "until" in state else ("without", "has one")
            raise ValueError(
                f"{self.subject}: the state must be of an object with the same until; it is of "
                f"one {saved} until, and this {here}. Build it as it was when it was saved."
            )
        if self.until is not None:
            self.until.private_copy().load_state_dict(state["until"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.until is not None:
            self.until.load_state_dict(state["until"])


def check_until(until: Any, subject: str) -> None:
    """TypeError for what is no Agreement."""
    if until is not None and not isinstance(until, Agreement):
        raise TypeError(
            f"{subject}: until must be a gaf.Agreement or None; got {until!r}. "
            "Use gaf.Agreement(rho=0.7, at_most=64)."
        )


def copy_rate(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Sets a learning rate; one that is a tensor in place, because a captured graph may hold it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate
