"""What all thresholds share: a state on the device, one update per decision, saving and loading."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gaf.arguments import real_number
from gaf.rules.gram import is_present
from gaf.rules.sequential import Seen
from gaf.shapes import Float64

LOOK_BACK = 50.0  # steps that the averages look back
VERSION = 2  # of a state; in the first, inner products counted in the units of the rows


@dataclass(eq=False)
class Threshold:
    """A tau that adapts. One object serves one policy: its state follows that policy's decisions.

    A kind of threshold gives its first state, tau as a function of the state, and the state after
    a step.
    """

    # whether it learns from the rows' Gram matrix, so that the rows must be kept
    needs_gram: ClassVar[bool] = False
    older_size: ClassVar[int] = 0  # of a state of the first version, if it was another
    _state: Tensor | None = field(default=None, init=False, repr=False)

    def first_state(self) -> list[float]:
        raise NotImplementedError

    def tau_from(self, state: Float64[Tensor, " m"]) -> Float64[Tensor, ""]:
        raise NotImplementedError

    def next_state(self, state: Float64[Tensor, " m"], seen: Seen) -> Float64[Tensor, " m"]:
        raise NotImplementedError

    def tau_on(self, device: torch.device) -> Float64[Tensor, ""]:
        """tau of the step at hand, () on the device."""
        return self.tau_from(self.state_on(device)).clamp(0, 2)

    def learn(self, seen: Seen) -> None:
        """Takes in one decision. Numbers that could not be measured leave the state as it was."""
        state = self.state_on(seen.norms2.device)
        after = self.next_state(state, seen)
        state.copy_(torch.where(after.isfinite(), after, state))

    def state_on(self, device: torch.device) -> Float64[Tensor, " m"]:
        """What was learned, (m,): the one tensor that a step changes, in place."""
        if self._state is None:
            self._state = torch.tensor(self.first_state(), dtype=torch.float64, device=device)
        if self._state.device != device:
            self._state = self._state.to(device)
        return self._state

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "state": None if self._state is None else self._state.tolist(),
            "version": VERSION,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, also in an earlier version, at the same tau.

        Raises:
            ValueError: for the state of another kind.
        """
        name, kind = type(self).__name__, state.get("kind") if isinstance(state, dict) else None
        if kind != name:
            raise ValueError(
                f"{name}: the state must be of the same kind of threshold; it is of "
                f"{kind if kind else repr(state)}. Build the policy as it was when it was saved."
            )
        vector = torch.tensor(self._saved_numbers(state), dtype=torch.float64, device="cpu")
        if self._state is None:
            self._state = vector
        else:
            self._state.copy_(vector)  # a captured graph may hold it

    def _saved_numbers(self, state: dict[str, Any]) -> list[float]:
        """What a saved state holds, in the form of this version."""
        numbers = state.get("state")
        if numbers is None:
            return self.first_state()
        older = state.get("version", 1) < VERSION
        size = self.older_size if older and self.older_size else len(self.first_state())
        if not isinstance(numbers, list | tuple) or len(numbers) != size:
            raise ValueError(
                f"{type(self).__name__}: the state must hold {size} numbers; it holds {numbers!r}. "
                "Load what state_dict() gave, whole."
            )
        return self.from_first_version(list(numbers)) if older else list(numbers)

    def from_first_version(self, state: list[float]) -> list[float]:
        """The state of the same meaning, from one that the first version saved."""
        return state


def check_range(threshold: Threshold, name: str, low: float, high: float) -> None:
    """ValueError if an argument is no number from low to high; numpy's numbers become Python's."""
    subject = f"{type(threshold).__name__}: {name}"
    given = getattr(threshold, name)
    number = real_number(subject, given, low, high, "Leave it out for the default.")
    setattr(threshold, name, number)


def fade(total: Tensor, value: Tensor, window: float) -> Tensor:
    """A sum over steps in which each counts 1 - 1 / window times as much as the one after it."""
    return total * (1 - 1 / window) + value


def mean_norm2(seen: Seen) -> Float64[Tensor, ""]:
    """Over present rows; NaN if there is none."""
    return torch.where(is_present(seen.norms2), seen.norms2, math.nan).nanmean()
