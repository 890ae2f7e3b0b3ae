"""Lets BatchNorm's running statistics move only for the micro-batches that a decision accepts."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormStatistics:
    """Holds the running statistics still while a macro-batch is collected, then replays what was accepted.

    A forward pass in training mode moves r to (1 - m) r + m x. Each micro-batch's move is noted and taken back; the
    moves of the accepted ones are made again, in order. Training itself does not see the difference, since in
    training mode BatchNorm normalises by the statistics of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.norms = [m for m in norms if m.running_mean is not None]
        self.begin()
        for i, norm in enumerate(self.norms):
            norm.register_forward_pre_hook(partial(self._arrive, i))

    def begin(self) -> None:
        """Starts a macro-batch; each layer's statistics are taken at its first forward pass in it."""
        self.start: list[list[Tensor] | None] = [None] * len(self.norms)
        self.moves: list[list[list[Tensor] | None]] = []

    def _arrive(self, i: int, norm: nn.Module, inputs: object) -> None:
        if norm.training and self.start[i] is None:
            self.start[i] = buffers_copy(self.norms[i])

    @torch.no_grad()
    def note(self) -> None:
        """After a micro-batch: keep its statistics and put those of the macro-batch's start back."""
        self.moves.append(
            [
                None if start is None else buffers_copy(m)
                for start, m in zip(self.start, self.norms, strict=True)
            ]
        )
        self.settle([])

    @torch.no_grad()
    def settle(self, accepted: list[bool]) -> None:
        """Put the start back and replay the accepted micro-batches."""
        for i, (norm, start) in enumerate(zip(self.norms, self.start, strict=True)):
            if start is None:
                continue
            state = [t.clone() for t in start]
            for move, taken in zip(self.moves, accepted, strict=False):
                after = move[i]
                state = (
                    replay(state, start, after, norm.momentum)
                    if taken and after is not None
                    else state
                )
            for buffer, value in zip(buffers(norm), state, strict=True):
                buffer.copy_(value)


def buffers(norm: _BatchNorm) -> list[Tensor]:
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]  # type: ignore[list-item]


def buffers_copy(norm: _BatchNorm) -> list[Tensor]:
    return [b.detach().clone() for b in buffers(norm)]


def replay(
    state: list[Tensor], start: list[Tensor], after: list[Tensor], momentum: float | None
) -> list[Tensor]:
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
