"""What a policy says about the k micro-gradients of one macro-batch, and what was measured of them."""

from dataclasses import dataclass

from torch import Tensor

from gaf.shapes import Bool, Float64


@dataclass(frozen=True, eq=False)
class Decision:
    """Weights of the rows and whether to step, with the distances that decided.

    All fields are tensors on the Gram matrix's device, so that taking a decision costs no host synchronisation.

    Attributes:
        weights: (k,) float64; the update is `weights @ rows`. Zeros where not stepped.
        accepted: (k,) bool; the rows that make up the update. All False where not stepped.
        stepped: () bool; whether the optimizer is to step.
        distances: (k,) float64 in [0, 2]; cosine distance of each row to the running sum that it was compared with.
            0 for the row that the sum started from, NaN for an absent row (zero, NaN or infinite).
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
