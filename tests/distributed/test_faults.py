"""A rank that dies or hangs: the others end with an error within the group's timeout."""

import datetime
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.problems import Wide, plain_loss
from helpers.ranks import Ranks, answer

pytestmark = pytest.mark.distributed

# Seconds of the group in which a rank is lost. The ranks have started, connected and trained
# before. On a slow machine a rank that is late in this group looks lost as well: the others' error
# comes earlier, and is the same.
SHORT = datetime.timedelta(seconds=4)
FOREVER = 1e6  # seconds; the test kills the process


def train(group: "dist.ProcessGroup | None", last: Callable[[], None]) -> None:
    """Two steps. last: called before the backward pass of the second one."""
    model = DistributedDataParallel(Wide(), process_group=group)
    optimizer = SGD(model.parameters(), 0.1)
    gaf.attach(model, optimizer, gaf.GAF(2.0))
    for step in range(2):
        optimizer.zero_grad()
        loss = plain_loss(model, step, dist.get_rank())
        if step == 1:
            last()
        loss.backward()
        optimizer.step()


def lose_a_rank(how: str) -> None:
    def leave() -> None:
        if dist.get_rank() == 1:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(FOREVER)

    train(None, lambda: None)
    dist.barrier()
    train(dist.new_group(timeout=SHORT), leave)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_end_with_an_error(how: str) -> None:
    ranks = Ranks(3)
    try:
        ranks.start(lose_a_rank, how)
        errors = [answer(ranks.pipes[rank])[1] for rank in (0, 2)]
        for error in errors:
            assert error is not None
            assert "RuntimeError" in error or "DistBackendError" in error
    finally:
        ranks.broken = True
        ranks.close()
