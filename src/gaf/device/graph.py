"""Which operations and parameters the graph of a loss holds."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def goes_through(loss: Tensor, *words: str) -> bool:
    """Whether the name of an operation in the loss's graph contains one of the words."""
    return any(word in node.name() for node in nodes_of(loss) for word in words)


def reaches(loss: Tensor, p: Tensor) -> bool:
    """Whether the loss depends on the parameter."""
    return any(getattr(node, "variable", None) is p for node in nodes_of(loss))


def nodes_of(loss: Tensor) -> Iterator[Node]:
    """The operations of the loss's graph."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)
