"""Which parameters an optimizer step must leave alone, and how it is made to."""

from collections.abc import Sequence

from torch import Tensor

from gaf.ranks.stale import StaleGradients, is_set


class SkippedParameters:
    """Parameters whose decisions skip. Without gradients a dense optimizer leaves them alone.

    Attributes:
        current: those that the pass in progress skips.
        frozen: those that the next optimizer step must not move.
        frozen_at_zero: those that it must not move if their gradient is zero: an earlier pass of
            this step skipped them, and this rank cannot see whether another rank's later pass has
            reached them.
    """

    def __init__(self) -> None:
        self.current: list[Tensor] = []
        self.frozen: set[Tensor] = set()
        self.frozen_at_zero: set[Tensor] = set()

    def begin_pass(self, several: bool) -> None:
        """several: whether the pass shares its step with an earlier one."""
        self.frozen_at_zero = self.frozen_at_zero | self.frozen if several else set()
        self.frozen = set()
        self.current = []

    def add(self, params: Sequence[Tensor]) -> None:
        self.current += params

    def discard(self, p: Tensor) -> None:
        if self.frozen or self.frozen_at_zero:  # a tensor's hash takes long
            self.frozen.discard(p)
            self.frozen_at_zero.discard(p)

    def end_pass(self, stale: StaleGradients, several: bool) -> None:
        waiting = {p for p in self.current if several and stale.holds_old_update(p)}
        self.frozen.update(p for p in self.current if p not in waiting)
        self.frozen_at_zero |= waiting

    def clear_gradients(self, params: Sequence[Tensor]) -> None:
        """Takes the gradients of skipped parameters away, before an optimizer steps on them."""
        if not self.frozen and not self.frozen_at_zero:
            return
        for p in params:
            at_zero = p in self.frozen_at_zero and p.grad is not None and not bool(is_set(p))
            if p in self.frozen or at_zero:
                p.grad = None
        self.frozen.difference_update(params)
        self.frozen_at_zero.difference_update(params)

    def close(self, params: set[Tensor]) -> None:
        """Carries out what is left to skip, on these parameters; no step will be watched again."""
        left = self.frozen | self.frozen_at_zero
        self.clear_gradients([p for p in params if p in left])
        self.current = []
