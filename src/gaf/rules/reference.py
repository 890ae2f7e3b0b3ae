"""GAF as the paper has it: vectors, no Gram matrix, float64.

Slow and short. The tests compare everything else with it.
"""

import torch
from torch import Tensor

from gaf.arguments import one_of, real_number, whole_number
from gaf.rules.gram import check_rows
from gaf.shapes import Float, Float64


def reference(
    rows: Float[Tensor, "k n"], tau: float, average: str = "mean", min_accepted: int = 2
) -> tuple[Float64[Tensor, " n"] | None, list[bool]]:
    """Algorithm 1 of arXiv 2412.18052 (start="first").

    Returns the update, None for a skip, and which rows were accepted.
    """
    check_rows(rows)
    tau = real_number("reference: tau", tau, 0, 2, "The paper uses 0.97.")
    one_of("reference: average", average, ("mean", "halving"))
    min_accepted = whole_number("reference: min_accepted", min_accepted, 1, "The paper uses 2.")
    total, accepted = None, []
    for g in rows.double():
        sound = bool(g.isfinite().all() and g.norm() > 0)
        if total is None:
            accepted.append(sound)
            total = g if sound else None
            continue
        cosine = torch.zeros((), dtype=g.dtype, device=g.device)
        if total.norm() > 0:
            cosine = torch.dot(total, g) / (total.norm() * g.norm())
        accepted.append(sound and bool((1 - cosine).clamp(0, 2) <= tau + 1e-12))
        if accepted[-1]:
            total = (total + g) / 2 if average == "halving" else total + g
    count = sum(accepted)
    if total is None or count < (1 if len(rows) == 1 else min_accepted):
        return None, [False] * len(rows)
    return total if average == "halving" else total / count, accepted
