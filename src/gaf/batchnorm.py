"""Lets BatchNorm's running statistics move only for the micro-batches that a decision accepts."""

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
        self.moves: list[list[list[Tensor]]] = []
        self.start: list[list[Tensor]] = []
        self.begin()
        model.register_load_state_dict_post_hook(lambda module, keys: self.begin())

    def begin(self) -> None:
        """Takes the statistics as they are for the start of the next macro-batch."""
        self.start, self.moves = [buffers_copy(m) for m in self.norms], []

    @torch.no_grad()
    def note(self) -> None:
        """After a micro-batch: keep its statistics and put those of the macro-batch's start back."""
        self.moves.append([buffers_copy(m) for m in self.norms])
        self.settle([])

    @torch.no_grad()
    def settle(self, accepted: list[bool]) -> None:
        """Put the start back and replay the accepted micro-batches."""
        for i, norm in enumerate(self.norms):
            state = [t.clone() for t in self.start[i]]
            for move, taken in zip(self.moves, accepted, strict=False):
                state = replay(state, self.start[i], move[i], norm.momentum) if taken else state
            for buffer, value in zip(buffers(norm), state, strict=True):
                buffer.copy_(value)


def buffers(norm: _BatchNorm) -> list[Tensor]:
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]  # type: ignore[list-item]


def buffers_copy(norm: _BatchNorm) -> list[Tensor]:
    return [b.detach().clone() for b in buffers(norm)]


def replay(state: list[Tensor], start: list[Tensor], after: list[Tensor], momentum: float | None) -> list[Tensor]:
    """Makes upon `state` the move that led from `start` to `after`; momentum None is the cumulative average."""
    passes = after[2] - start[2]  # forward passes in this micro-batch: two for a GAN's discriminator
    if not passes:
        return state
    if momentum is None:
        count = state[2] + passes
        moved = [(s * state[2] + a * after[2] - b * start[2]) / count for s, b, a in zip(state[:2], start[:2], after[:2], strict=True)]
    else:
        decay = (1 - momentum) ** passes
        moved = [a + decay * (s - b) for s, b, a in zip(state[:2], start[:2], after[:2], strict=True)]
    return [*moved, state[2] + passes]
