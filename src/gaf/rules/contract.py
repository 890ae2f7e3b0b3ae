"""What a policy is: a callable from K to a Decision or to weights, with optional attributes.

Plain weights (k,), a tensor of any floating-point type, stand for the Decision that accepts the
rows whose weight is not zero, and steps if there is one (`gaf.rules.asking`).

Because all attributes are optional, a plain function is a policy. The functions at the right read
them:

    scope            "all", "group" or "layer": what one decision covers        scope_of
    min_accepted     the policy never steps on fewer accepted rows              min_accepted_of
    argument_of_least  the name of the argument that sets min_accepted        argument_of_least
    max_norm_ratio   a row of more than this many median norms is absent        max_norm_ratio_of
    metric           "optimizer": it is given K = G M G^T, with M by the optimizer's second moments
                     (gaf.rules.second_moments), by engines that have one at hand       metric_of
    tau              its threshold, a number or an object that adapts           given_tau
    planned          (step, k) -> the k weights of a step, whatever its rows    is_planned
    present_only     it is given the K of the present rows only           sees_present_only
    judge            RowSums -> Decision: it needs no more of K than that       judges_sums
    needs_cosines    whether the next decision needs more than the norms      needs_cosines
    overflowed       k squared norms -> whether a loss scale is too high    judging.has_overflow
    loss_scale       what the rows were multiplied by; the engine sets it   tell_loss_scale
    merge            rows of a slice -> its update: a coordinate-wise rule              merge_of
    findings         what it noticed in its last decision       gaf.rules.finding.findings_of
    on_alarm         is called with each new alarm              gaf.rules.finding.on_alarm_of
    private_copy     () -> a copy that learns by itself                          private_copy
    state_dict       () -> what it has learned                                  learned_state
    load_state_dict  takes back what state_dict gave                            load_learned_state

A `Sequential` policy also gives a rule for rows one by one, so that they can be added up as they
arrive: see `gaf.rules.sequential`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gaf.rules.decision import Decision

# (k, k) float64 -> Decision, or weights (k,)
Policy = Callable[[Tensor], Decision | Tensor]
# (rows (r, c), place) -> (c,). The rows are the accepted ones, in float32 or float64, and may be
# written over. The place is where their first coordinate stands in the engine's order.
Merge = Callable[[Tensor, int], Tensor]
# of torchjd.aggregation
TAKE_ROWS = {
    *("Aggregator", "ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting"),
    "_NashMTLWeighting",
}


def check_policy(policy: Any, subject: str) -> Any:
    """TypeError where this is no policy; subject: whose argument it is, for the message."""
    if isinstance(policy, type) or not callable(policy):
        raise TypeError(
            f"{subject}: policy must be a callable from a Gram matrix to a Decision; "
            f"got {policy!r}. Use gaf.GAF(tau=0.97)."
        )
    check_takes_gram(policy, subject)
    return policy


def check_takes_gram(policy: Any, subject: str) -> None:
    """TypeError for what of TorchJD takes a matrix of rows: given K, it would answer all the same.

    A symmetric K passes for a matrix of k rows, and k numbers for weights.
    """
    names = {c.__name__ for c in type(policy).__mro__ if c.__module__.startswith("torchjd.")}
    if names.isdisjoint(TAKE_ROWS):
        return
    kind = type(policy).__name__
    way = "Use one of its weightings of the Gramian, such as MGDAWeighting()."
    if hasattr(policy, "gramian_weighting"):
        way = f"Use {kind}(...).gramian_weighting."
    raise TypeError(
        f"{subject}: policy must be a callable from a Gram matrix; torchjd's {kind} takes the rows "
        f"themselves. {way}"
    )


def scope_of(policy: Any) -> str:
    """What one decision is about: "all" of the gradient, a "group" or a "layer" of it."""
    return getattr(policy, "scope", "all")


def min_accepted_of(policy: Any) -> int:
    """Accepted rows without which the policy never steps."""
    return getattr(policy, "min_accepted", 1)


def argument_of_least(policy: Any) -> str:
    """The argument by which a policy is told how many rows it needs, for messages."""
    return getattr(policy, "argument_of_least", "min_accepted")


def max_norm_ratio_of(policy: Any) -> float | None:
    """Rows longer than this many times the median length count as absent; None for no limit."""
    return getattr(policy, "max_norm_ratio", None)


def metric_of(policy: Any) -> str:
    """By which inner products the policy wants its K; "optimizer" is the engine's to give."""
    return getattr(policy, "metric", "euclidean")


def given_tau(policy: Any) -> Any:
    """The tau that the policy was given, a number or a threshold object; None without one."""
    return getattr(policy, "tau", None)


def is_planned(policy: Any) -> bool:
    """Whether the weights of a step are known before its rows: by `planned(step, k)`."""
    return hasattr(policy, "planned")


def sees_present_only(policy: Any) -> bool:
    """Whether the policy is given the K of the present rows, and decides about those alone.

    By its attribute `present_only`. A torch.nn.Module does unless it says otherwise: TorchJD's
    weightings are modules, and most of them fail on a K that holds a NaN.
    """
    return bool(getattr(policy, "present_only", isinstance(policy, nn.Module)))


def merge_of(policy: Any) -> Merge | None:
    """How a coordinate-wise rule makes a slice of the update; None for a policy with weights."""
    return getattr(policy, "merge", None)


def judges_sums(policy: Any) -> bool:
    """Whether the policy decides from K's diagonal and row sums alone: by `judge(RowSums)`."""
    return hasattr(policy, "judge")


def needs_cosines(policy: Any) -> bool:
    """Whether the next decision needs the rows' products with their sum, or their norms alone."""
    return bool(getattr(policy, "needs_cosines", True))


def tell_loss_scale(policy: Any, scale: float) -> None:
    """Tells a policy that asks for it what the losses were multiplied by, before it decides."""
    if hasattr(policy, "loss_scale"):
        policy.loss_scale = scale


def private_copy(policy: Any) -> Any:
    """A copy that learns by itself, so that one policy can serve several runs.

    By its method `private_copy`; a policy without one is returned as it is.
    """
    return policy.private_copy() if hasattr(policy, "private_copy") else policy


def learned_state(policy: Any) -> Any:
    """What the policy has learned; None for one that learns nothing."""
    return policy.state_dict() if hasattr(policy, "state_dict") else None


def load_learned_state(policy: Any, state: Any) -> None:
    """Gives the policy back what it had learned; nothing to do for one that learns nothing.

    Raises:
        ValueError: for what another policy has learned.
    """
    if hasattr(policy, "load_state_dict"):
        policy.load_state_dict(state)
    elif state:
        raise ValueError(
            f"policy {policy!r} learns nothing, and the state is of one that does: it holds "
            f"{describe_state(state)}. Build the policy as it was when the state was saved."
        )


def describe_state(state: Any) -> str:
    """What a saved state holds, in words."""
    if not isinstance(state, dict):
        return repr(state)
    return str(sorted(map(str, state))) if state else "nothing"
