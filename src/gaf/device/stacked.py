"""The micro-gradients of one macro-batch, all k of them kept apart until the decision."""

import torch
from torch import Tensor

from gaf.device.buffers import (
    Buffers,
    is_missing,
    norm2_of_rest,
    unshare_all,
    voting_part,
    where_any,
)
from gaf.device.packs import Apart, Packs
from gaf.rules.blas import gram_of_by_blas
from gaf.rules.combine import combine, weighted_sum
from gaf.rules.contract import Policy, merge_of
from gaf.rules.decision import Decision, Evidence
from gaf.rules.judging import decide_with_evidence
from gaf.rules.merging import merged_parameters
from gaf.shapes import Float64


class StackedRows:
    """All k rows, for policies that need them apart.

    Args:
        policy: gives the decision.
        packs: which vectors a row is made of.
        roots: as for `rows_for`.
        decides_on_host: whether to wait for K and decide on the CPU. On an accelerator a decision
            takes some hundred small operations.
    """

    def __init__(
        self,
        policy: Policy,
        packs: Apart | Packs,
        roots: Buffers | None = None,
        decides_on_host: bool = False,
    ) -> None:
        self.policy, self.packs, self.decides_on_host = policy, packs, decides_on_host
        self.roots = None if roots is None else voting_part(packs.pack(list(roots)), packs.votes)
        self.rows: list[Buffers] = []
        self.had_gradient: list[list[bool]] = []  # as in StreamedRows

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Buffers) -> None:
        """Keeps a row."""
        self.had_gradient.append([grad is not None for grad in row])
        row = self.packs.pack(row)
        unshare_all(row)
        self.rows.append(row)

    def decide(self) -> tuple[Decision, Evidence]:
        gram = self._gram()
        for own, row in zip(gram.diagonal(), self.rows, strict=True):
            own += norm2_of_rest(row, self.packs.votes)
        return decide_with_evidence(self.policy, gram.cpu() if self.decides_on_host else gram)

    def _gram(self) -> Float64[Tensor, "k k"]:
        """Of the parameters that take part, on the device of the rows' products."""
        parts, device = [voting_part(row, self.packs.votes) for row in self.rows], self.packs.device
        if all(map(is_missing, parts)):  # moving products of nothing to the device would wait
            return torch.zeros(len(parts), len(parts), dtype=torch.float64, device=device)
        return gram_of_by_blas(parts, self.roots).to(device)

    def update(self, weights: list[float]) -> Buffers:
        """w^T G; None for a parameter that no accepted row has a gradient for."""
        used = [(row, w) for row, w in zip(self.rows, weights, strict=True) if w]
        merge = merge_of(self.policy)
        if merge is not None:
            total = merged_parameters([row for row, _ in used], merge)
        else:
            total = [weighted_sum([(row[j], w) for row, w in used]) for j in range(len(used[0][0]))]
        had = [had for had, w in zip(self.had_gradient, weights, strict=True) if w]
        return where_any(had, self.packs.unpack(total))

    def spare(self) -> list[Buffers]:
        """Rows to hold until their memory is needed again; see `BackwardPass`.

        Freed together they would go back to the system, and fresh memory costs a CPU a page fault
        for every 4 KiB. The first row is left out: the update takes its memory.
        """
        on_cpu = all(t is None or t.device.type == "cpu" for row in self.rows for t in row)
        return self.rows[1:] if on_cpu else []

    def update_on_device(self, weights: Float64[Tensor, " k"]) -> list[Tensor]:
        """w^T G for weights that stay on the device, as `StreamedRows.update_on_device`."""
        assert merge_of(self.policy) is None
        columns = zip(*self.rows, strict=True)
        total: Buffers = [combine(weights, [g for g in one if g is not None]) for one in columns]
        return [g for g in self.packs.unpack(total) if g is not None]
