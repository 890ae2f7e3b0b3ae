"""Lets BatchNorm's running statistics move only for the micro-batches that a decision accepts."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakMethod, finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from gaf.device.graph import goes_through

State = list[Tensor]  # mean, variance, number of forward passes


class BatchNormStatistics:
    """Holds the running statistics still while a macro-batch is collected, then replays what was accepted.

    A forward pass in training mode moves r to (1 - m) r + m x. Each micro-batch's move is noted and taken back; the
    moves of the accepted ones are made again, in order. Training itself does not see the difference, since in
    training mode BatchNorm normalises by the statistics of the batch.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.layers = [] if model is None else [Layer(norm) for norm in batch_norms(model)]

    def begin(self) -> None:
        """Starts a macro-batch from the statistics as they are."""
        for layer in self.layers:
            layer.begin()

    def check(self, loss: Tensor) -> None:
        """Before a micro-batch's backward pass.

        Raises:
            RuntimeError: where the forward passes since the one before are not this loss's. The statistics are put back.
        """
        if not self.layers:
            return
        latest = max((layer.latest for layer in self.layers), default=-1)
        later = loss.grad_fn is not None and loss.grad_fn._sequence_nr() < latest
        if later or (self._stands_still() and goes_through(loss, "BatchNorm", "Compiled")):
            self.settle([])
            seen = (
                "came after this loss's own" if later else "was the micro-batch's before this one"
            )
            raise RuntimeError("Accumulator: bn='accepted' needs each micro-batch's forward pass and its acc.backward(loss) to follow each "
                               f"other, to know whose statistics are whose; the last forward pass in training mode {seen}. "
                               "Call acc.backward(loss) right after each forward pass, add up the losses of one, run other passes in "
                               "evaluation mode; or use bn='all'.")  # fmt: skip

    def _stands_still(self) -> bool:
        """Whether no layer has run for this micro-batch, although they train and did run for an earlier one."""
        began = any(move is not None for layer in self.layers for move in layer.moves)
        return (
            began
            and not any(layer.moved for layer in self.layers)
            and any(layer.norm.training for layer in self.layers)
        )

    @torch.no_grad()
    def note(self) -> None:
        """After a micro-batch: keep its statistics and put those of the macro-batch's start back."""
        for layer in self.layers:
            layer.note()

    @torch.no_grad()
    def settle(self, accepted: Sequence[bool]) -> None:
        """Put the start back and replay the accepted micro-batches."""
        for layer in self.layers:
            layer.settle(accepted)


class Layer:
    """One layer's statistics: where the macro-batch starts from, and each micro-batch's move.

    Statistics that somebody else writes (a checkpoint, a reset) are a new start. That is looked for before each forward pass; a
    compiled model calls no hooks in it, so that there only `load_state_dict` is seen.
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
        self.start = None if is_lazy(buffers(self.norm)[0]) else state_of(self.norm)
        self._rest()

    def _rest(self) -> None:
        """What is there now is what this object knows of."""
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
            if (
                norm is self.norm and output.grad_fn is not None
            ):  # not a replica in a thread of its own
                self.latest = output.grad_fn._sequence_nr()

    @property
    def moved(self) -> bool:
        """Whether a forward pass in training mode came since the last note. Asks no device for a value."""
        return self._ran or (self.norm.training and versions(self.norm)[1] != self._count)

    def note(self) -> None:
        moved = self.moved and self.start is not None
        self.moves.append((self.start, state_of(self.norm)) if moved else None)  # type: ignore[arg-type]
        self.settle([])

    def settle(self, accepted: Sequence[bool]) -> None:
        moves = [
            m for m, taken in zip(self.moves, accepted, strict=False) if taken and m is not None
        ]
        if self.start is None or not (moves or self.moved):
            return
        state = self.start
        for move in moves:
            state = replay(state, *move, self.norm.momentum)
        for buffer, value in zip(buffers(self.norm), state, strict=True):
            buffer.copy_(value)
        self._rest()


class WeakHook:
    """A method of a layer, called for as long as the layer is there. A copied or unpickled model has none, nor has a compiled pass."""

    def __init__(self, method: "WeakMethod[Any] | None" = None) -> None:
        self.method = method

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            method = self.method() if self.method is not None else None
            if method is not None:
                method(*args)

    def __reduce__(self) -> Any:
        return WeakHook, ()


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics.

    Raises:
        TypeError: for statistics that are kept by something else.
    """
    found = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None
    ]
    for name, m in model.named_modules():
        if "num_batches_tracked" in dict(m.named_buffers(recurse=False)) and m not in found:
            raise TypeError("Accumulator: bn='accepted' holds the statistics of torch's BatchNorm layers still, and of no others; "
                            f"{name!r} keeps its own and is a {type(m).__name__}. Use bn='all', or track_running_stats=False "
                            "there.")  # fmt: skip
    return found


def buffers(norm: _BatchNorm) -> list[Tensor]:
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]  # type: ignore[list-item]


def state_of(norm: _BatchNorm) -> State:
    return [b.detach().clone() for b in buffers(norm)]


def versions(norm: _BatchNorm) -> tuple[tuple[int, ...], int]:
    """What changes when somebody writes mean or variance, and when the forward passes are counted. In eager mode a pass counts, and
    torch does not call it writing; one that is compiled is both."""
    mean, variance, passes = buffers(norm)
    return (id(mean), mean._version, id(variance), variance._version), passes._version


def replay(state: State, start: State, after: State, momentum: float | None) -> State:
    """Makes upon `state` the move that led from `start` to `after`; momentum None is the cumulative average."""
    # forward passes in this micro-batch: two for a GAN's discriminator
    passes = after[2] - start[2]
    if not passes:
        return state
    if momentum is None:
        count = state[2] + passes
        moved = [
            (s * state[2] + a * after[2] - b * start[2]) / count
            for s, b, a in zip(state[:2], start[:2], after[:2], strict=True)
        ]
    else:
        decay = (1 - momentum) ** passes
        moved = [
            a + decay * (s - b) for s, b, a in zip(state[:2], start[:2], after[:2], strict=True)
        ]
    return [*moved, state[2] + passes]
