"""Moves BatchNorm's running statistics only for the micro-batches that a decision accepts."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakMethod, finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from gaf.device.graph import goes_through
from gaf.device.running_statistics import (
    State,
    batch_norms,
    replay,
    state_of,
    statistics_of,
    versions,
    write_state,
)


class BatchNormStatistics:
    """Holds running statistics still during a macro-batch, then replays the accepted moves.

    A forward pass in training mode moves r to (1 - m) r + m x. Each micro-batch's move is noted and
    taken back; the moves of the accepted ones are made again, in order. Training itself does not
    see the difference, since in training mode BatchNorm normalises by the statistics of the batch.

    Args:
        model: whose layers; None for no layers, and then every method does nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        norms = [] if model is None else batch_norms(model)
        self.layers = [Layer(norm) for norm in norms]

    def begin(self) -> None:
        """Starts a macro-batch from the statistics as they are."""
        for layer in self.layers:
            layer.begin()

    def check(self, loss: Tensor) -> None:
        """Called before a micro-batch's backward pass.

        Raises:
            RuntimeError: where the last forward passes are not this loss's. The statistics are put
                back.
        """
        if not self.layers:
            return
        latest = max(layer.latest for layer in self.layers)
        if loss.grad_fn is not None and loss.grad_fn._sequence_nr() < latest:
            self._refuse("came after this loss's own")
        if self._stands_still() and goes_through(loss, "BatchNorm", "Compiled"):
            self._refuse("was the micro-batch's before this one")

    def _refuse(self, what: str) -> None:
        self.settle([])
        raise RuntimeError(
            "Accumulator: bn='accepted' needs each micro-batch's forward pass and its "
            "acc.backward(loss) to follow each other, to know whose statistics are whose; the last "
            f"forward pass in training mode {what}. Call acc.backward(loss) right after each "
            "forward pass, add up the losses of one, run other passes in evaluation mode; or use "
            "bn='all'."
        )

    def _stands_still(self) -> bool:
        """Whether no layer ran for this micro-batch, although layers train and ran before."""
        began = any(move is not None for layer in self.layers for move in layer.moves)
        moved = any(layer.moved for layer in self.layers)
        return began and not moved and any(layer.norm.training for layer in self.layers)

    @torch.no_grad()
    def note(self) -> None:
        """Keeps a micro-batch's statistics, and puts back those of the macro-batch's start."""
        for layer in self.layers:
            layer.note()

    @torch.no_grad()
    def settle(self, accepted: Sequence[bool]) -> None:
        """Puts the start back and replays the accepted micro-batches."""
        for layer in self.layers:
            layer.settle(accepted)


class Layer:
    """One layer's statistics: where the macro-batch starts from, and each micro-batch's move.

    Statistics that other code writes (a checkpoint, a reset) are a new start. They are noticed
    before each forward pass. A compiled model calls no hooks in it, so that only `load_state_dict`
    is noticed there.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        for register, method in (
            (norm.register_forward_pre_hook, self._before_pass),
            (norm.register_forward_hook, self._after_pass),
            (norm.register_load_state_dict_post_hook, self._restart),
        ):
            finalize(self, register(WeakHook(WeakMethod(method))).remove)
        self.begin()

    def begin(self) -> None:
        # (before, after) of each micro-batch; None where the layer did not run
        self.moves: list[tuple[State, State] | None] = []
        self._restart()

    def _restart(self, *_: Any) -> None:
        lazy = is_lazy(statistics_of(self.norm)[0])
        self.start = None if lazy else state_of(self.norm)
        self._mark()

    def _mark(self) -> None:
        """Takes the layer as it is now as known: what changes from here on is a pass or a write."""
        self._ran, self.latest = False, -1
        self._written, self._count = versions(self.norm)

    def _before_pass(self, norm: nn.Module, inputs: Any) -> None:
        if norm.training:
            if versions(self.norm)[0] != self._written:
                self.start = state_of(self.norm)
            self._ran = True

    def _after_pass(self, norm: nn.Module, inputs: Any, output: Tensor) -> None:
        if norm.training:
            self._written = versions(self.norm)[0]
            replica = norm is not self.norm  # of nn.DataParallel, in a thread of its own
            if output.grad_fn is not None and not replica:
                self.latest = output.grad_fn._sequence_nr()

    @property
    def moved(self) -> bool:
        """Whether a forward pass in training mode came since the last note.

        Does not wait for a device.
        """
        return self._ran or (self.norm.training and versions(self.norm)[1] != self._count)

    def note(self) -> None:
        move = None
        if self.moved and self.start is not None:
            move = self.start, state_of(self.norm)
        self.moves.append(move)
        self.settle([])

    def settle(self, accepted: Sequence[bool]) -> None:
        pairs = zip(self.moves, accepted, strict=False)
        moves = [move for move, taken in pairs if taken and move is not None]
        if self.start is None or not (moves or self.moved):
            return
        state = self.start
        for move in moves:
            state = replay(state, *move, self.norm.momentum)
        write_state(self.norm, state)
        self._mark()


class WeakHook:
    """A method of an object as a hook, called for as long as the object exists.

    A copied or unpickled model has none, and a compiled pass calls none.
    """

    def __init__(self, method: "WeakMethod[Any] | None" = None) -> None:
        self.method = method

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            method = self.method() if self.method is not None else None
            if method is not None:
                method(*args)

    def __reduce__(self) -> Any:
        return WeakHook, ()
