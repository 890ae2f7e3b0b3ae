"""Which operations the graph of a loss holds."""

from torch import Tensor


def goes_through(loss: Tensor, *words: str) -> bool:
    """Whether the name of an operation in the loss's graph contains one of the words."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(word in node.name() for word in words):
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False
