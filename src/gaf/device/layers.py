"""Filters each layer by itself (scope="layer"), in one backward pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gaf.device.buffers import Buffers
from gaf.device.checks import Names
from gaf.device.rows import StreamedRows, rows_for, rows_without_waiting
from gaf.device.stacked import StackedRows
from gaf.rules.contract import Policy
from gaf.rules.decision import Decision, Evidence
from gaf.rules.judging import join_layer_decisions


class LayeredRows:
    """Holds each layer's rows apart, to be decided on and combined by themselves.

    Args:
        layers: by name, the indices of a layer's parameters; together all of them, each once.
        holders: for each layer, of its rows.

    Attributes:
        decisions: each layer's, by its name, once `decide` was called.
    """

    def __init__(
        self, layers: Mapping[str, list[int]], holders: Sequence[StreamedRows | StackedRows]
    ) -> None:
        self.layers, self.holders = layers, holders
        self.decisions: dict[str, Decision] = {}
        self._own = torch.zeros(0, 0)  # (layers, k), their weights

    def __len__(self) -> int:
        return len(self.holders[0])

    def add(self, row: Buffers) -> None:
        """Gives each layer its part of a row, which is used up."""
        for indices, holder in zip(self.layers.values(), self.holders, strict=True):
            part = [row[j] for j in indices]
            for j in indices:
                row[j] = None
            holder.add(part)

    def decide(self) -> tuple[Decision, Evidence]:
        """The layers' decisions joined to one; each is kept in `decisions`."""
        found = [holder.decide() for holder in self.holders]
        decisions = [decision for decision, _ in found]
        self.decisions = dict(zip(self.layers, decisions, strict=True))
        # Reading the joined decision waits for this copy too, so `update` need not.
        weights = torch.stack([decision.weights for decision in decisions])
        self._own = weights.to("cpu", non_blocking=True)
        return join_layer_decisions(decisions, [evidence for _, evidence in found])

    def update(self, weights: list[float]) -> Buffers:
        """w^T G with each layer's own weights; None for the parameters of a layer that skips.

        weights: of the joined decision, on the host.
        """
        joined: Buffers = [None] * sum(map(len, self.layers.values()))
        own = self._own.tolist()
        for holder, w, indices in zip(self.holders, own, self.layers.values(), strict=True):
            for j, part in zip(indices, holder.update(w) if any(w) else (), strict=False):
                joined[j] = part
        return joined


def layered_rows_for(
    policy: Policy,
    layers: Mapping[str, list[int]],
    voters: Sequence[bool],
    params: Sequence[Tensor],
    roots: Buffers | None = None,
) -> LayeredRows:
    """A holder for each layer; arguments as for `rows_for`."""
    holders = []
    for indices in layers.values():
        own = [params[j] for j in indices]
        # on an accelerator all layers together are waited for once
        make = rows_for if own[0].device.type == "cpu" else rows_without_waiting
        part = None if roots is None else [roots[j] for j in indices]
        holders.append(make(policy, [voters[j] for j in indices], own, part))
    return LayeredRows(layers, holders)


def layers_of(params: Sequence[nn.Parameter], names: Names) -> dict[str, list[int]]:
    """The parameters' indices by the module that holds them."""
    layers: dict[str, list[int]] = {}
    for j, p in enumerate(params):
        layers.setdefault(names[p].rpartition(".")[0] or names[p], []).append(j)
    return layers
