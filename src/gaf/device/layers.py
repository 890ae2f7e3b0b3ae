"""Filters each layer by itself (scope="layer"), in one backward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaf.device.buffers import Buffers
from gaf.device.checks import Names
from gaf.device.rows import StackedRows, StreamedRows, rows_for
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
        self._place: dict[int, tuple[StreamedRows | StackedRows, int]] = {}
        for indices, holder in zip(layers.values(), holders, strict=True):
            self._place |= {j: (holder, i) for i, j in enumerate(indices)}

    def __len__(self) -> int:
        return len(self.holders[0])

    def _join(self, parts: Sequence[Sequence[Any]]) -> list[Any]:
        """The layers' lists as one, in the order of the parameters."""
        joined: list[Any] = [None] * len(self._place)
        for indices, part in zip(self.layers.values(), parts, strict=True):
            for j, one in zip(indices, part, strict=True):
                joined[j] = one
        return joined

    @property
    def spare(self) -> Buffers:
        return self._join([holder.spare for holder in self.holders])

    def take(self, j: int, grad: Tensor) -> None:
        holder, i = self._place[j]
        holder.take(i, grad)

    def drop(self) -> None:
        for holder in self.holders:
            holder.drop()

    def add(self) -> None:
        for holder in self.holders:
            holder.add()

    def decide(self) -> tuple[Decision, Evidence]:
        """The layers' decisions joined to one; each is kept in `decisions`."""
        found = [holder.decide() for holder in self.holders]
        decisions = [decision for decision, _ in found]
        self.decisions = dict(zip(self.layers, decisions, strict=True))
        return join_layer_decisions(decisions, [evidence for _, evidence in found])

    def update(self, weights: list[float]) -> Buffers:
        """w^T G with each layer's own weights; None for the parameters of a layer that skips."""
        own = torch.stack([decision.weights for decision in self.decisions.values()]).tolist()
        parts: list[Buffers] = []
        for holder, w, indices in zip(self.holders, own, self.layers.values(), strict=True):
            parts.append(holder.update(w) if any(w) else [None] * len(indices))
        return self._join(parts)


def layered_rows_for(
    policy: Policy,
    layers: Mapping[str, list[int]],
    voters: Sequence[bool],
    spare: Buffers,
    device: torch.device,
) -> LayeredRows:
    """A holder for each layer; arguments as for `rows_for`."""
    holders = []
    for indices in layers.values():
        own_voters, own_spare = [voters[j] for j in indices], [spare[j] for j in indices]
        holders.append(rows_for(policy, own_voters, own_spare, device))
    return LayeredRows(layers, holders)


def layers_of(params: Sequence[nn.Parameter], names: Names) -> dict[str, list[int]]:
    """The parameters' indices by the module that holds them."""
    layers: dict[str, list[int]] = {}
    for j, p in enumerate(params):
        layers.setdefault(names[p].rpartition(".")[0] or names[p], []).append(j)
    return layers
