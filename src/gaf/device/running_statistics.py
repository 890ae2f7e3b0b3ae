"""The running statistics of a BatchNorm layer: reading them, noticing writes, replaying a move."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

State = list[Tensor]  # mean, variance, number of forward passes


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics.

    Raises:
        TypeError: for statistics that are kept by something else.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    found = [norm for norm in norms if norm.num_batches_tracked is not None]
    for name, m in model.named_modules():
        if "num_batches_tracked" in dict(m.named_buffers(recurse=False)) and m not in found:
            raise TypeError(
                "Accumulator: bn='accepted' holds the statistics of torch's BatchNorm layers "
                f"still, and of no others; {name!r} keeps its own and is a {type(m).__name__}. "
                "Use bn='all', or track_running_stats=False there."
            )
    return found


def statistics_of(norm: _BatchNorm) -> list[Tensor]:
    found = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return list(found)  # type: ignore[arg-type]


def state_of(norm: _BatchNorm) -> State:
    return [b.detach().clone() for b in statistics_of(norm)]


def write_state(norm: _BatchNorm, state: State) -> None:
    for buffer, value in zip(statistics_of(norm), state, strict=True):
        buffer.copy_(value)


def versions(norm: _BatchNorm) -> tuple[tuple[int, ...], int]:
    """What changes with a write to mean or variance, and what changes with a forward pass.

    In eager mode a pass changes only the second, because torch does not count it as a write. A
    compiled pass changes both.
    """
    mean, variance, passes = statistics_of(norm)
    return (id(mean), mean._version, id(variance), variance._version), passes._version


def replay(state: State, start: State, after: State, momentum: float | None) -> State:
    """Makes the move that led from `start` to `after` once more, from `state` on.

    A momentum of None is the cumulative average.
    """
    # forward passes in this micro-batch: two for a GAN's discriminator
    passes = after[2] - start[2]
    if not passes:
        return state
    triples = zip(state[:2], start[:2], after[:2], strict=True)
    if momentum is None:
        count = state[2] + passes
        moved = [(s * state[2] + a * after[2] - b * start[2]) / count for s, b, a in triples]
    else:
        decay = (1 - momentum) ** passes
        moved = [a + decay * (s - b) for s, b, a in triples]
    return [*moved, state[2] + passes]
