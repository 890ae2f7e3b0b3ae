"""Micro-batches as `gaf.probe` takes them: pairs (x, y) or mappings, all of one size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def loss_on(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], micro_batch: Any) -> Tensor:
    """The micro-batch's loss ()."""
    if isinstance(micro_batch, Mapping):
        loss = loss_fn(model(**micro_batch), micro_batch)
    else:
        x, y = pair_of(micro_batch)
        loss = loss_fn(model(x), y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            "probe: loss_fn must return the mean loss of a micro-batch, a tensor of one number; "
            f"got {seen}. Use reduction='mean'."
        )
    return loss


def pair_of(micro_batch: Any) -> tuple[Any, Any]:
    """x and y."""
    if isinstance(micro_batch, list | tuple) and len(micro_batch) == 2:
        return micro_batch[0], micro_batch[1]
    parts = f" of {len(micro_batch)}" if isinstance(micro_batch, list | tuple) else ""
    raise TypeError(
        "probe: a micro-batch must be a pair (x, y) or a mapping; "
        f"got {type(micro_batch).__name__}{parts}. "
        "Have the loader give pairs, or dictionaries of what the model takes by name."
    )


def iterator_of(micro_batches: Any) -> Iterator[Any]:
    """TypeError if they cannot be iterated over."""
    try:
        return iter(micro_batches)
    except TypeError as error:
        raise TypeError(
            "probe: micro_batches must be an iterable of (x, y) pairs or mappings; "
            f"got {type(micro_batches).__name__}. Give a DataLoader or a list."
        ) from error


def same_size(micro_batches: Sequence[Any]) -> int:
    """Samples in each micro-batch. ValueError if they differ."""
    sizes = [samples_in(one) for one in micro_batches]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"probe: micro_batches must all hold as many samples; number {i} holds {size}, "
                f"the first {sizes[0]}. Use drop_last=True in the DataLoader."
            )
    return sizes[0] if sizes else 0


def samples_in(micro_batch: Any) -> int:
    """The length of its first tensor."""
    parts = parts_of_micro_batch(micro_batch)
    first = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if first is None:
        raise TypeError(
            "probe: a micro-batch must be a pair (x, y) or a mapping, with a tensor of b samples "
            f"in it; got {type(micro_batch).__name__}. If it holds no tensor, pass b=."
        )
    return len(first)


def parts_of_micro_batch(micro_batch: Any) -> list[Any]:
    """The values of a mapping, or x and y; nothing for anything else."""
    if isinstance(micro_batch, Mapping):
        return list(micro_batch.values())
    if isinstance(micro_batch, list | tuple) and len(micro_batch) == 2:
        return list(micro_batch)
    return []
