"""What a policy decides about the k micro-gradients of one macro-batch, and the evidence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gaf.shapes import Bool, Float64


@dataclass(frozen=True, eq=False)
class Decision:
    """Weights of the rows and whether to step, with the distances that decided.

    All fields are tensors on the Gram matrix's device, so that a decision costs no host
    synchronisation.

    Attributes:
        weights: (k,) float64; the update is `weights @ rows`, but for a coordinate-wise rule, whose
            weights are 1 over the number of accepted rows. Zeros where not stepped.
        accepted: (k,) bool; the rows that make up the update. All False where not stepped.
        stepped: () bool; whether the optimizer is to step.
        distances: (k,) float64 in [0, 2]; cosine distance of each row to the running sum that it
            was compared with. 0 for the row that the sum started from, NaN for an absent row (zero,
            NaN or infinite).
    """

    weights: Float64[Tensor, " k"]
    accepted: Bool[Tensor, " k"]
    stepped: Bool[Tensor, ""]
    distances: Float64[Tensor, " k"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of the rows beside the decision.

    Attributes:
        norms2: (k,) float64, squared norms.
        signal: () float64, an estimate of |g|^2, the squared norm of what the rows have in common.
        tau: () float64, the largest distance that was accepted; NaN for a policy without one.
    """

    norms2: Float64[Tensor, " k"]
    signal: Float64[Tensor, ""]
    tau: Float64[Tensor, ""]


def as_skip(decision: Decision) -> Decision:
    """The same distances, no step."""
    return Decision(
        weights=torch.zeros_like(decision.weights),
        accepted=torch.zeros_like(decision.accepted),
        stepped=torch.zeros_like(decision.stepped),
        distances=decision.distances,
    )


def check_decision(decision: Any, policy: Any, k: int, device: torch.device) -> Decision:
    """The decision that a policy returned, if it is one about these rows.

    Looks at no value, and so waits for no device.

    Args:
        decision: what the policy returned.
        policy: named in messages.
        k: how many rows it decided about.
        device: of the Gram matrix.

    Raises:
        TypeError: if it is no Decision of tensors.
        ValueError: if a field has another shape, another kind of numbers, or another device.
    """
    if not isinstance(decision, Decision) or not all(
        isinstance(part, Tensor) for part in vars(decision).values()
    ):
        found = describe_value(decision)
        raise TypeError(
            f"policy {policy!r}: it must return a gaf.Decision of tensors, or k weights as a "
            f"tensor; got {found}. "
            "Build one with a tensor for each field, on the Gram matrix's device."
        )
    for name, part in vars(decision).items():
        check_field(name, part, policy, () if name == "stepped" else (k,), device)
    return decision


def describe_value(value: Any) -> str:
    return f"one with {value!r}" if isinstance(value, Decision) else repr(value)


def check_field(
    name: str, part: Tensor, policy: Any, shape: tuple[int, ...], device: torch.device
) -> None:
    """ValueError if a field of a Decision has another shape, kind of numbers or device."""
    if name in ("accepted", "stepped"):
        kind, sound = "bool", part.dtype == torch.bool
    else:
        kind, sound = "float64 (or another floating point type)", part.is_floating_point()
    if tuple(part.shape) == shape and sound and part.device == device:
        return
    one = {"weights": "weight", "distances": "distance"}.get(name, name)
    rows = f"for each of the {shape[0]} rows" if shape else "for all rows together, of shape ()"
    raise ValueError(
        f"policy {policy!r}: a Decision must have, in {kind} and on the Gram matrix's device "
        f"{device}, one {one} {rows}; got shape {tuple(part.shape)} of {part.dtype} on "
        f"{part.device}. See gaf.Decision for each field."
    )


def check_weights(weights: Sequence[float], stepped: bool, policy: Any) -> None:
    """Refuses a step whose weights are not finite: no parameter would stay finite after it.

    Raises:
        ValueError: if the step is taken and a weight is not finite, or all are zero.
    """
    if stepped and not any(weights):
        raise ValueError(
            f"policy {policy!r}: a Decision that steps must give some row a weight; all "
            f"{len(weights)} are 0. Set stepped=False to skip."
        )
    if stepped and not all(map(math.isfinite, weights)):
        raise ValueError(
            f"policy {policy!r}: a Decision that steps must have finite weights; "
            f"got {list(weights)}. Give a row that is not to count the weight 0, or do not step."
        )
