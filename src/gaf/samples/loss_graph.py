"""The graph behind losses: the noted calls of layers, and how often each parameter is used."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from gaf.samples.layers import Call
from gaf.samples.recording import NOTE

Node = Any  # torch.autograd.graph.Node

# operations that pass a parameter on: what counts is who uses their result
PASSING_ON = ("TBackward", "ToCopyBackward", "TransposeBackward", "PermuteBackward", "ViewBackward")


class LossGraph:
    """Walks the graph once.

    Attributes:
        nodes: all of them, each after those that it hands gradients on to.
        calls: by node, the layer's call that made it, as noted.
        parameters: by parameter, the node that would add to its gradient.
    """

    def __init__(self, losses: Tensor) -> None:
        self.nodes = ordered(losses.grad_fn)
        self.calls: dict[Node, Call] = {}
        self.parameters: dict[Tensor, Node] = {}
        self._users: dict[Node, list[Node]] = {}
        for node in self.nodes:
            if NOTE in node.metadata:
                self.calls[node] = node.metadata[NOTE]
            if hasattr(node, "variable"):
                self.parameters[node.variable] = node
            for following in followers(node):
                self._users.setdefault(following, []).append(node)

    def uses(self, parameter: Tensor) -> int:
        """How many operations the parameter is an operand of."""
        node = self.parameters.get(parameter)
        return 0 if node is None else self._uses(node)

    def _uses(self, node: Node) -> int:
        users = self._users.get(node, [])
        return sum(self._uses(u) if u.name().startswith(PASSING_ON) else 1 for u in users)

    def deepest(self, chosen: Collection[Node]) -> list[Node]:
        """Those of the chosen nodes below which there is no other.

        A backward pass to these runs through all the others.
        """
        above: set[Node] = set()  # nodes with a chosen one below
        for node in self.nodes:
            if any(following in chosen or following in above for following in followers(node)):
                above.add(node)
        return [node for node in self.nodes if node in chosen and node not in above]


def followers(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def ordered(root: Node) -> list[Node]:
    """All nodes of a graph, each after those that it hands gradients on to."""
    found: dict[Node, None] = {}
    begun: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting[-1]
        if node in begun:
            waiting.pop()
            found.setdefault(node)
        else:
            begun.add(node)
            waiting += [following for following in followers(node) if following not in begun]
    return list(found)
