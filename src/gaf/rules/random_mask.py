"""The control for sign agreement: the same share of coordinates moves, but which is random."""

import copy
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gaf.arguments import is_number, plain_number, whole_number
from gaf.rules.contract import describe_state
from gaf.rules.coordinatewise import Coordinatewise
from gaf.rules.decision import Decision
from gaf.shapes import Bool, Float, Float64, Int


@dataclass
class RandomMask(Coordinatewise):
    """The mean of all present rows, at coordinates that are drawn at random; the others are zero.

    The control for "`SignAgreement` only moves fewer coordinates". Whether a coordinate moves is
    drawn from the seed, the number of the step, and its place in the engine's order: that of the
    parameters in `gaf.Accumulator`, that of the buckets under DDP. Every call is one step.

    Args:
        keep_probability: chance that a coordinate moves, in (0, 1]. Higher moves more.
        seed: of the draws.
        scope: as for `gaf.Median`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    keep_probability: float
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.keep_probability
        if not is_number(p) or not 0 < p <= 1:
            raise ValueError(
                f"RandomMask: keep_probability must lie in (0, 1]; got {p!r}. "
                "Give the share of coordinates that SignAgreement moved."
            )
        self.keep_probability = plain_number(p)
        self.seed = whole_number("RandomMask: seed", self.seed, None, "0 is the default.")

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        self.step += 1
        return super().__call__(gram)

    def merge(self, rows: Float[Tensor, "r c"], place: int) -> Float[Tensor, " c"]:
        return torch.where(self.mask(place, rows.shape[1], rows.device), rows.mean(0), 0.0)

    def mask(self, place: int, c: int, device: torch.device) -> Bool[Tensor, " c"]:
        """Which of c coordinates from a place on move in the last step."""
        key = zlib.crc32(f"{self.seed}/{self.step}".encode()) << 31
        number = torch.arange(place, place + c, device=device)
        kept: Tensor = scramble(number + key) < self.keep_probability * 2**53
        return kept

    def private_copy(self) -> "RandomMask":
        return copy.copy(self)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: for the state of another policy.
        """
        if not isinstance(state, dict) or state.keys() != {"step"}:
            raise ValueError(
                "RandomMask: the state must be of a RandomMask, a number of steps; "
                f"it holds {describe_state(state)}. "
                "Build the policy as it was when it was saved."
            )
        subject = "RandomMask: the state's step"
        self.step = whole_number(subject, state["step"], 0, "Load what state_dict() gave.")


def scramble(number: Int[Tensor, " c"]) -> Int[Tensor, " c"]:
    """53 bits that look random, from different numbers (the finalizer of splitmix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        number = (number ^ without_sign(number, shift)) * factor  # int64 wraps around
    return without_sign(number ^ without_sign(number, 31), 11)


def without_sign(number: Int[Tensor, " c"], shift: int) -> Int[Tensor, " c"]:
    """The 64 bits shifted to the right, with zeros from the left."""
    kept: Tensor = (number >> shift) & (2 ** (64 - shift) - 1)
    return kept
