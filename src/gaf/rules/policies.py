"""Policies: from the k x k Gram matrix of the micro-gradients to a Decision, on the Gram's device.

A policy is any callable `gram -> Decision`. The ones here are `Sequential`: they visit the rows one by one and look only
at the running sum of the rows taken so far, so that they can decide while the rows stream by.
"""

import copy
import math
import random
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor

from gaf.arguments import is_number, one_of, plain_number, whole_number
from gaf.rules.contract import Policy
from gaf.rules.decision import Decision, as_skip
from gaf.rules.gram import check_gram, present
from gaf.rules.sequential import Seen, Sequential, visit, walk
from gaf.rules.thresholds import MovingAverageTau, Threshold
from gaf.shapes import Bool, Float64, Int


@dataclass(frozen=True)
class GAF(Sequential):
    """Gradient agreement filtering (arXiv 2412.18052, algorithm 1).

        s <- g_1, c <- 1
        for i = 2..k:   if 1 - <s, g_i> / (|s| |g_i|) <= tau:   s <- s + g_i,  c <- c + 1
        c < min_accepted: skip        else: step with s / c

    Args:
        tau: the largest cosine DISTANCE to the running sum that is accepted, in [0, 2]. Lower filters more; 2 accepts
            every present row; the paper used 0.97 under label noise and 1.0 without. It does not transfer between
            tasks: the mean distance between micro-gradients falls as the micro-batch grows. So it may also be a threshold
            object that adapts (`gaf.SignalTau`, `gaf.NoiseFloorTau`, `gaf.QuantileTau`, `gaf.MovingAverageTau`, `gaf.ScheduleTau`),
            or "auto" for the one that the measurements in docs/choosing-tau.md recommend.
        start: which row the sum starts from. "first": the first present one (the paper). "best": every present row is
            tried, visiting the others around the ring; the start that accepts most rows is kept, then the one whose
            accepted rows have the highest mean pairwise cosine, then the lowest. "worst": among the starts that reach
            min_accepted the one that accepts fewest, then the lowest mean cosine, then the lowest. Trying all costs
            O(k^3) scalars.
        average: "mean" of the accepted rows (the paper), or "halving", s <- (s + g_i) / 2 at each acceptance (the
            authors' released code), which weighs later rows more and changes later decisions. The same for k = 2.
        min_accepted: accepted rows, the start included, without which the step is skipped; at least 1. Higher skips
            more. With 1 the start alone is enough.
        max_norm_ratio: a row whose norm is more than this many times the lower median of the present rows' norms (of two rows, the
            smaller) counts as absent; at least 1. None (the paper): no limit. The rule looks at directions only: one huge row that
            agrees would otherwise be nearly all of the average.
        scope: "all": one decision for the whole gradient (the paper). "group": under `gaf.attach`, one for each of
            DDP's buckets or FSDP2's parameter groups. This is another algorithm: its decisions depend on how the
            engine groups parameters, and some groups can step where others do not. "layer": under `gaf.Accumulator(model=...)`,
            one for each module that has parameters; another algorithm too: what a layer is told by a micro-batch that another
            layer refused still counts. Both take a number for tau.

    An Accumulator and a Handle keep their own copy of what an adaptive tau learns: a policy may serve several.

    A single row (k = 1) has nothing to agree with: it steps as plain training does, unless it is absent.

    Raises:
        ValueError: where an argument is out of its range.

    >>> policy = GAF(tau=0.5)
    >>> policy(torch.tensor([[1.0, 0.9, -1.0], [0.9, 1.0, -0.9], [-1.0, -0.9, 1.0]], dtype=torch.float64)).weights
    tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """

    tau: float | Threshold | Literal["auto"] = 0.97
    _: KW_ONLY
    start: Literal["first", "best", "worst"] = "first"
    average: Literal["mean", "halving"] = "mean"
    min_accepted: int = 2
    max_norm_ratio: float | None = None
    scope: Literal["all", "group", "layer"] = "all"

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("tau", checked_tau(self.tau))
        one_of("GAF: start", self.start, ("first", "best", "worst"))
        one_of("GAF: average", self.average, ("mean", "halving"))
        one_of("GAF: scope", self.scope, ("all", "group", "layer"))
        least = whole_number("GAF: min_accepted", self.min_accepted, 1, "The paper uses 2.")
        put("min_accepted", least)
        if self.max_norm_ratio is not None:
            put("max_norm_ratio", checked_ratio(self.max_norm_ratio))
        if self.scope != "all" and isinstance(self.tau, Threshold):
            raise ValueError(f"GAF: with scope {self.scope!r} tau must be a number, for a threshold object follows one decision per step; "
                             f"got {self.tau!r}. Use scope='all'.")  # fmt: skip

    @property
    def streams(self) -> bool:  # type: ignore[override]
        stays = isinstance(self.tau, Threshold) and self.tau.needs_gram
        return self.start == "first" and self.max_norm_ratio is None and not stays

    def tau_on(self, device: torch.device) -> Float64[Tensor, ""]:
        """The largest distance that the step at hand accepts, () on the device."""
        tau = self.tau.tau_on(device) if isinstance(self.tau, Threshold) else cast(float, self.tau)
        return (
            tau
            if isinstance(tau, Tensor)
            else torch.full((), tau, dtype=torch.float64, device=device)
        )

    def visit(
        self, count: Tensor, inner: Tensor, norm2: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        return visit(
            count,
            inner,
            norm2,
            own,
            self.tau.tau_on(inner.device)
            if isinstance(self.tau, Threshold)
            else cast(float, self.tau),
        )

    def learn(self, seen: Seen) -> None:
        if isinstance(self.tau, Threshold):
            self.tau.learn(seen)

    def state_dict(self) -> dict[str, Any]:
        """What an adaptive tau has learned; nothing for a number."""
        return {"tau": self.tau.state_dict()} if isinstance(self.tau, Threshold) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave. The state of a run whose tau was a number holds nothing.

        Raises:
            ValueError: for the state of another policy.
        """
        if not isinstance(state, dict) or state.keys() - {"tau"}:
            raise ValueError(f"GAF: the state must be of a policy of the same kind; it holds {contents(state)}. "
                             "Build the policy as it was when it was saved.")  # fmt: skip
        if isinstance(self.tau, Threshold) and state:
            self.tau.load_state_dict(state["tau"])

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        return self._decision(
            accepted, distances, torch.arange(len(accepted), device=accepted.device)
        )

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        check_gram(gram)
        if self.max_norm_ratio is not None:
            gram = without_giants(gram, self.max_norm_ratio)
        if self.start == "first":
            return super().__call__(gram)
        k = len(gram)
        row = torch.arange(k, device=gram.device)
        orders = (row[:, None] + row) % k  # start s visits s, s + 1, ... around the ring
        accepted, distances, signals = walk(self, gram, orders)
        # an index of its own dimension: a scalar one would be fetched
        chosen = self._choose(gram, accepted)[None]
        self.learn(
            Seen(
                accepted[chosen][0], distances[chosen][0], gram.diagonal(), signals[chosen][0], gram
            )
        )
        return self._decision(accepted[chosen][0], distances[chosen][0], orders[chosen][0])

    def _least(self, k: int) -> int:
        return 1 if k == 1 else self.min_accepted

    def _decision(
        self,
        accepted: Bool[Tensor, " k"],
        distances: Float64[Tensor, " k"],
        order: Int[Tensor, " k"],
    ) -> Decision:
        stepped = accepted.sum() >= self._least(len(accepted))
        accepted = accepted & stepped
        visited = accepted[order]
        weights = torch.zeros_like(distances)
        weights[order] = (
            mean_weights(visited) if self.average == "mean" else halving_weights(visited)
        )
        return Decision(weights, accepted, stepped, distances)

    def _choose(
        self, gram: Float64[Tensor, "k k"], accepted: Bool[Tensor, "s k"]
    ) -> Int[Tensor, ""]:
        """The start that start="best" or "worst" asks for."""
        count, cosine = accepted.sum(1).double(), mean_pairwise_cosine(gram, accepted)
        least = 1 if self.start == "best" else self._least(len(gram))
        sign = 1.0 if self.start == "best" else -1.0
        left = present(gram.diagonal()) & (count >= least)
        for score in (sign * count, sign * cosine):
            score = torch.where(left, score, -math.inf)
            left = left & (score == score.max())
        return left.int().argmax()


def checked_tau(tau: Any) -> float | Threshold:
    """What GAF takes as tau, as a number of Python's or a threshold object."""
    if isinstance(tau, Threshold):
        return tau
    if isinstance(tau, str) and tau == "auto":
        return automatic()
    if not is_number(tau) or not 0 <= tau <= 2:
        raise ValueError(f"GAF: tau is a cosine distance and must lie in [0, 2], or be a threshold object or 'auto'; got {tau!r}. "
                         f"{way_to_tau(tau)}")  # fmt: skip
    return plain_number(tau)


def way_to_tau(given: Any) -> str:
    """How to mend a tau that cannot be used."""
    if isinstance(given, type) and issubclass(given, Threshold):
        return f"Call it: gaf.{given.__name__}()."
    if isinstance(given, Tensor):
        return "Give tau.item()."
    return "The paper uses 0.97; 2 accepts everything."


def checked_ratio(ratio: Any) -> float:
    if not is_number(ratio) or not ratio >= 1:
        raise ValueError(
            f"GAF: max_norm_ratio must be None or a number of at least 1; got {ratio!r}. 10 lets ordinary rows pass."
        )
    return plain_number(ratio)


def contents(state: Any) -> str:
    """What a saved state holds, in words."""
    return (str(sorted(map(str, state))) if state else "nothing") if isinstance(state, dict) else f"{state!r}"  # fmt: skip


def automatic() -> Threshold:
    """The threshold that tau="auto" stands for, a new one."""
    return MovingAverageTau(0.05)


def private_copy(policy: Any) -> Any:
    """The same policy with a state of its own, where it has one: what it learns under one run stays there."""
    if isinstance(policy, GAF) and isinstance(policy.tau, Threshold):
        twin = copy.copy(policy)
        object.__setattr__(twin, "tau", copy.deepcopy(policy.tau))
        return twin
    return copy.copy(policy) if isinstance(policy, RandomSkip) else policy


def without_giants(gram: Float64[Tensor, "k k"], ratio: float) -> Float64[Tensor, "k k"]:
    """The Gram matrix with rows zero, that is absent, whose norm is more than `ratio` times the (lower) median of the present ones."""
    norms = torch.where(present(gram.diagonal()), gram.diagonal().sqrt(), math.nan)
    giant = norms > ratio * norms.nanmedian()
    return torch.where(giant | giant[:, None], 0.0, gram)


def mean_pairwise_cosine(
    gram: Float64[Tensor, "k k"], accepted: Bool[Tensor, "s k"]
) -> Float64[Tensor, " s"]:
    """Per start, the mean cosine over pairs i < j of accepted rows; equal sets give equal bits. 0 where there is no pair."""
    norm = gram.diagonal().sqrt()
    cosines = torch.where(
        present(gram.diagonal()) & present(gram.diagonal())[:, None],
        gram / norm / norm[:, None],
        0.0,
    )
    total, taken = gram.new_zeros(len(accepted)), accepted.double()
    for j in range(1, len(gram)):
        total = total + taken[:, j] * (taken[:, :j] * cosines[:j, j]).sum(1)
    count = taken.sum(1)
    return total / (count * (count - 1) / 2).clamp_min(1)


def mean_weights(accepted: Bool[Tensor, " k"]) -> Float64[Tensor, " k"]:
    return accepted.double() / accepted.sum().clamp_min(1)


def halving_weights(accepted: Bool[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """1/2 for the last accepted row, 1/4 for the one before, ...; the first has what is left. In the order of the visit."""
    count = accepted.cumsum(0)
    after = count[-1] - count
    exponent = torch.where(count == 1, after, after + 1)
    return torch.where(accepted, 0.5 ** exponent.double(), 0.0)


class Mean(Sequential):
    """Plain averaging, weights 1 / k: every row counts, and a NaN goes through, as under DistributedDataParallel.

    Distances are those that `GAF(2.0)` would report. In statistics an absent row (zero, NaN or infinite) is absent, not accepted.
    Under `gaf.Accumulator` on an accelerator a second sum is held, of the present rows, for later ones to be compared with.

    >>> Mean()(torch.eye(4, dtype=torch.float64)).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    adds_absent = True

    def visit(
        self, count: Tensor, inner: Tensor, norm2: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        return visit(count, inner, norm2, own, tau=2.0)

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        weights = torch.full_like(distances, 1 / len(distances))
        return Decision(weights, torch.ones_like(accepted), torch.ones_like(accepted[0]), distances)

    def __repr__(self) -> str:
        return "Mean()"


@dataclass
class RandomSkip(Mean):
    """The control for "GAF only takes fewer steps": averages as Mean and steps with a fixed probability.

    Step t is drawn from (seed, t), so that all ranks and a resumed run agree. Every call is one step.

    Args:
        step_probability: chance that a step is taken, in [0, 1]. Higher steps more often.
        seed: of the draws.

    Raises:
        ValueError: where step_probability is not in [0, 1].
    """

    step_probability: float
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        p = self.step_probability
        if not is_number(p) or not 0 <= p <= 1:
            raise ValueError(
                f"RandomSkip: step_probability must lie in [0, 1]; got {p!r}. Give the share of steps that GAF took."
            )
        self.step_probability = plain_number(p)
        self.seed = whole_number("RandomSkip: seed", self.seed, None, "0 is the default.")

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        weights = self.planned(self.step, len(distances))
        self.step += 1
        decision = super().conclude(accepted, distances)
        return decision if any(weights) else as_skip(decision)

    def planned(self, step: int, k: int) -> list[float]:
        """The k weights of step `step`, counted from 0: known before its rows are."""
        draw = random.Random(f"{self.seed}/{step}").random()
        return [1 / k if draw < self.step_probability else 0.0] * k

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for the state of another policy.
        """
        if not isinstance(state, dict) or state.keys() != {"step"}:
            raise ValueError(f"RandomSkip: the state must be of a RandomSkip, a number of steps; it holds {contents(state)}. "
                             "Build the policy as it was when it was saved.")  # fmt: skip
        self.step = whole_number("RandomSkip: the state's step", state["step"], 0, "Load what state_dict() gave.")  # fmt: skip


def averages(policy: Any) -> bool:
    """Whether every row counts whatever the Gram matrix says: `Mean` and its kin."""
    return isinstance(policy, Mean) and type(policy).__call__ is Sequential.__call__


def streams(policy: Policy) -> TypeGuard[Sequential]:
    """Whether the policy decides on rows that are added up as they come."""
    return (
        isinstance(policy, Sequential)
        and policy.streams
        and type(policy).__call__ in (Sequential.__call__, GAF.__call__)
    )
