"""The data, the model and the optimizer of a run on several ranks."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import gaf
from gaf_lab.data.run_data import RunData
from gaf_lab.settings.checks import ConfigError
from gaf_lab.training.objective import Objective
from gaf_lab.training.ranks import PATIENCE, Group


class OverRanks:
    """gaf.attach with the methods of gaf.Accumulator.

    Each rank runs a backward pass; then all step, or none.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: Optimizer, policy: Any) -> None:
        self.optimizer, self.handle = optimizer, gaf.attach(model, optimizer, policy)

    @property
    def outcome(self) -> gaf.Outcome | None:
        return self.handle.outcome

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        return self.handle.gate(scheduler)

    def stats(self, b: float = 1) -> dict[str, Any]:
        return self.handle.stats(b)

    def state_dict(self) -> dict[str, Any]:
        return self.handle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts an Accumulator's state too, which counts nothing per rank."""
        self.handle.load_state_dict({"rejected": [], "absent": []} | state)


def check_same_on_ranks(data: RunData, group: Group) -> None:
    """Refuses ranks whose tasks gave them different training data.

    Their micro-batches would be drawn from different samples, and the ranks could take different
    numbers of steps.

    Raises:
        ConfigError: on the first rank whose data are not those of rank 0.
        Elsewhere: on the others.
    """
    if group.world == 1:
        return
    first = group.on_rank_0(lambda: data.checksum)

    def check() -> None:
        if data.checksum != first:
            raise ConfigError(
                f"training data: must be the same on all ranks; rank {group.rank} has those of "
                f"checksum {data.checksum}, rank 0 of {first}. In the task's function, draw random "
                "numbers from config.seed, and sort what comes from a set or a folder."
            )

    group.each(check)


def data_parallel(
    model: nn.Module, group: Group, data: RunData, objective: Objective
) -> DistributedDataParallel:
    """The model over all ranks, its buckets in their final order.

    DistributedDataParallel rearranges its buckets after its first backward pass, and with them the
    order in which numbers are added. A first pass, over any micro-batch, changes nothing else, and
    makes every start of a run add in the same order.
    """
    cuda = data.device.type == "cuda"
    gradients = dist.new_group(backend="nccl", timeout=PATIENCE) if cuda else None
    wrapped = DistributedDataParallel(
        model, device_ids=[group.local] if cuda else None, process_group=gradients
    )
    training = model.training
    wrapped.eval()  # moves no statistics
    x, y = data.micro_batch(0, group.rank)
    objective(wrapped, x, y, data.index(0, group.rank), 0, group.rank).backward()
    wrapped.zero_grad()
    wrapped.train(training)
    return wrapped
