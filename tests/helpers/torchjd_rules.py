"""TorchJD's weightings of a Gram matrix, by name; imported only when one is made."""

from importlib.util import find_spec
from typing import Any

NEEDS = {"UPGrad": "quadprog", "DualProj": "quadprog", "CAGrad": "cvxpy", "FairGrad": "scipy"}
ARGUMENTS: dict[str, tuple[Any, ...]] = {"CAGrad": (0.5,), "FairGrad": (1.0,), "Krum": (1,)}
RULES = [
    name
    for name in ("AlignedMTL", "CAGrad", "DualProj", "FairGrad", "IMTLG", "Krum", "MGDA", "UPGrad")
    if find_spec(NEEDS.get(name, "torch"))
]


def weighting(name: str) -> Any:
    from torchjd import aggregation

    return getattr(aggregation, f"{name}Weighting")(*ARGUMENTS.get(name, ()))
