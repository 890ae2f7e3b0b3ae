"""What was seen of each sample over its visits: a few numbers for each."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf.samples.float_buffers import FloatBuffers
from gaf.shapes import Float, Int

# columns of the table
VISITS, SCORE, LOSS, DISAGREED, LABEL, GUESS, LEAD = range(7)


class History(FloatBuffers):
    """Sums over the visits of each sample, as one buffer.

    Attributes:
        table: (N, 7). `VISITS`; sums over them of `SCORE`, `LOSS`, and of whether the guess
            `DISAGREED` with the label; the last `LABEL`; the `GUESS` that came most often, by
            Boyer and Moore's vote, and its `LEAD`.
        limit: N, if it was given; otherwise the table grows.
    """

    table: Tensor

    def __init__(self, n: int | None, device: torch.device) -> None:
        super().__init__()
        self.limit = n
        self.register_buffer("table", torch.zeros(n or 0, 7, device=device))

    def visits(self, index: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """How often each sample was seen before."""
        self._grow(index)
        return self.table[index, VISITS]

    def add(
        self,
        index: Int[Tensor, " n"],
        scores: Float[Tensor, " n"],
        losses: Float[Tensor, " n"],
        labels: Int[Tensor, " n"],
        guesses: Int[Tensor, " n"],
    ) -> None:
        """Adds a visit of each sample; one whose score is NaN was not judged."""
        self._grow(index)
        judged = ~scores.isnan()
        new = torch.stack([judged.to(scores), scores, losses, (guesses != labels).to(scores)], 1)
        new = torch.where(judged[:, None], new, 0).to(self.table)
        self.table.index_put_((index[:, None], torch.arange(4, device=index.device)), new, True)
        rows = self.table[index]
        lead = torch.where(rows[:, GUESS] == guesses, rows[:, LEAD] + 1, rows[:, LEAD] - 1)
        guess = torch.where(lead < 0, guesses.to(rows), rows[:, GUESS])
        lead = torch.where(lead < 0, 1.0, lead)
        kept = torch.stack([labels.to(rows), guess, lead], 1)
        self.table[index, LABEL:] = torch.where(judged[:, None], kept, rows[:, LABEL:])

    def _grow(self, index: Int[Tensor, " n"]) -> None:
        if self.limit is not None or not len(index):
            return
        needed = int(index.max()) + 1
        if needed > len(self.table):
            more = self.table.new_zeros(max(needed, 2 * len(self.table)), 7)
            more[: len(self.table)] = self.table
            self.table = more

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        saved = state_dict.get(prefix + "table")
        if isinstance(saved, Tensor) and saved.ndim == 2:
            n = len(saved) if self.limit is None else self.limit
            if not saved[n:].any():  # rows of samples that were never seen, from a table that grew
                self.table = self.table.new_zeros(n, saved.shape[1])
                more = saved.new_zeros(max(n - len(saved), 0), saved.shape[1])
                state_dict[prefix + "table"] = torch.cat([saved[:n], more])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def gathered(self, group: dist.ProcessGroup | None) -> Float[Tensor, "N 7"]:
        """The table over all ranks of the group; called on all of them."""
        n = torch.tensor(len(self.table), device=self.table.device)
        dist.all_reduce(n, dist.ReduceOp.MAX, group=group)
        mine = self.table.new_zeros(int(n), 7)
        mine[: len(self.table)] = self.table
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        tables = torch.stack(every)
        seen = tables[:, :, VISITS] > 0
        best = torch.where(seen, tables[:, :, LEAD], -1).argmax(0)
        return torch.cat(
            [
                tables[:, :, :LABEL].sum(0),
                tables[best, torch.arange(int(n), device=best.device), LABEL:],
            ],
            1,
        )
